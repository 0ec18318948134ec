"""Measure XLA's matmul speed on this machine and print one JSON line; `inference.py` runs it as a separate process.

Matmuls have fp32 sums and results, and weights are stored [out, in], as in the model (see ops/linear.py). Each matmul
of a layer cycles through as many weights as the model has layers, so that they are read from memory as in the model.
"""

import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 128
CUBE = 4096
NUM_LAYERS = 30
# (in, out) -> count in one step of SmolLM2-135M: query and output, key and value, gate and up, down, the head.
MATMULS = {
    (576, 576): 2 * NUM_LAYERS,
    (576, 192): 2 * NUM_LAYERS,
    (576, 1536): 2 * NUM_LAYERS,
    (1536, 576): NUM_LAYERS,
    (576, 49152): 1,
}
REPEATS = 7


@jax.jit
def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return x @ weight.T."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def seconds_per_matmul(rows: int, size_in: int, size_out: int, num_weights: int, dtype: str) -> float:
    """Return the seconds per matmul, the median over passes through all weights."""
    rng = np.random.default_rng(0)
    array = functools.partial(jnp.asarray, dtype=jnp.dtype(dtype))
    x = array(rng.standard_normal((rows, size_in), np.float32))
    weights = [array(rng.standard_normal((size_out, size_in), np.float32)) for _ in range(num_weights)]
    passes: list[float] = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([matmul(x, weight) for weight in weights])
        passes.append((time.perf_counter() - start) / num_weights)
    return statistics.median(passes[1:])  # the first one compiles


def main() -> None:
    cube = CUBE if "--small" not in sys.argv else CUBE // 4
    figures: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        cube_seconds = seconds_per_matmul(cube, cube, cube, 1, dtype)
        rates = {f"{cube}^3": 2 * cube**3 / cube_seconds}
        step_seconds = step_flop = 0.0
        for (size_in, size_out), count in MATMULS.items():
            flop = 2 * ROWS * size_in * size_out
            seconds = seconds_per_matmul(ROWS, size_in, size_out, min(count, NUM_LAYERS), dtype)
            rates[f"{ROWS} rows [{size_in}->{size_out}]"] = flop / seconds
            step_seconds += count * seconds
            step_flop += count * flop
        figures[dtype] = rates | {f"all products of a step, {ROWS} rows": step_flop / step_seconds}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
