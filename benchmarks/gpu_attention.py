"""Attention of one decode step over paged keys and values on a GPU: our kernel, plain XLA, and cuDNN.

    uv run --extra gpu python benchmarks/gpu_attention.py        # a minute on one H100 or H200
    uv run python benchmarks/gpu_attention.py --tiny             # on CPU, only to check that everything runs

It measures one layer of Llama-3.1-8B: 32 query heads over 8 key/value heads of 128, bfloat16. cuDNN is called through
`jax.nn.dot_product_attention`, for which the pages of each sequence are gathered first. The first sequences of every
result are compared with `paged_attention_reference` in float32. It prints a table and one JSON line. Without
`--tiny`, it also writes benchmarks/results/gpu_attention.json.
"""

import argparse
import functools
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from result_files import write_result

from simpo_pipeline.distributed.mesh import local_mesh
from simpo_pipeline.ops.paged_attention_gpu import GpuPagedAttention, in_xla
from simpo_pipeline.ops.paged_attention_reference import ReferencePagedAttention
from simpo_pipeline.ops.paged_batch import PagedSequences
from simpo_pipeline.ops.paged_xla import attend_in_tiles

HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE = 32, 8, 128, 64
# Number of sequences, and the smallest and largest number of keys of each.
CASES = {"128 x 1088": (128, 1088, 1088), "128 x 1 to 2112": (128, 1, 2112), "8 x 8192": (8, 8192, 8192)}
TINY = {"2 x 70": (2, 70, 70)}
ROUNDS, CALLS = 5, 40

# (q, keys, values, page table, query starts, lengths) -> out like q.
Attention = Callable[..., jax.Array]


def by_cudnn(q: Any, keys: Any, values: Any, table: Any, query_starts: Any, kv_lens: Any) -> jax.Array:
    """Gather the pages, then attend with cuDNN."""
    del query_starts
    k, v = (pages[table].reshape(table.shape[0], -1, KV_HEADS, HEAD_SIZE) for pages in (keys, values))
    lens = {"query_seq_lengths": jnp.ones_like(kv_lens), "key_value_seq_lengths": kv_lens}
    return jax.nn.dot_product_attention(q[:, None], k, v, implementation="cudnn", **lens)[:, 0]


def by_xla(q: Any, keys: Any, values: Any, *rest: Any) -> jax.Array:
    """Attend with plain XLA, one block of keys after another."""
    return attend_in_tiles(q, in_xla(keys, values), PagedSequences(*rest, num_single=q.shape[0]), KV_HEADS)


def by_backend(backend: Any, q: Any, keys: Any, values: Any, *rest: Any) -> jax.Array:
    """Attend with a `PagedAttention`."""
    return backend.attend(q, (keys, values), PagedSequences(*rest, num_single=q.shape[0]))


def random_case(num_seqs: int, least: int, most: int) -> tuple[jax.Array, ...]:
    """Return scattered pages of random values, drawn on the device."""
    rng = np.random.default_rng(0)
    pages_per_seq = -(-most // PAGE_SIZE)
    table = rng.permutation(num_seqs * pages_per_seq).astype(np.int32).reshape(num_seqs, -1)
    kv_lens = rng.integers(least, most + 1, num_seqs).astype(np.int32)
    shape = (table.size, PAGE_SIZE, KV_HEADS, HEAD_SIZE)

    def draw() -> tuple[jax.Array, ...]:
        shapes = (num_seqs, HEADS, HEAD_SIZE), shape, shape
        keys = jax.random.split(jax.random.key(0), 3)
        return tuple(jax.random.normal(key, each, jnp.bfloat16) for key, each in zip(keys, shapes, strict=True))

    return (*jax.jit(draw)(), *map(jnp.asarray, (table, np.arange(num_seqs + 1, dtype=np.int32), kv_lens)))


def largest_error(out: jax.Array, case: tuple[jax.Array, ...]) -> float:
    """Return the largest error of a few sequences, compared with the reference in float32."""
    q, keys, values, table, _, kv_lens = case
    few = min(4, q.shape[0])
    wide = [array.astype(jnp.float32) for array in (q[:few], keys, values)]
    sequences = PagedSequences(table[:few], jnp.arange(few + 1, dtype=jnp.int32), kv_lens[:few], num_single=few)
    expected = jax.jit(ReferencePagedAttention().attend)(wide[0], (wide[1], wide[2]), sequences)
    return float(jnp.max(jnp.abs(out[:few].astype(jnp.float32) - expected)))


def milliseconds(attend: Attention, case: tuple[jax.Array, ...], calls: int) -> float:
    """Return the median over rounds of many calls each; the keys and values of a call are far larger than caches."""
    jax.block_until_ready(attend(*case))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([attend(*case) for _ in range(calls)])
        rounds.append(1000 * (time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def measured(name: str, attend: Attention, case: tuple[jax.Array, ...], calls: int) -> dict[str, Any]:
    """Return one row of the table, or the error if this device cannot run it."""
    num_bytes = 2 * int(np.sum(np.asarray(case[5]))) * KV_HEADS * HEAD_SIZE * 2
    try:
        compiled = jax.jit(attend)
        took = milliseconds(compiled, case, calls)
        error = largest_error(compiled(*case), case)
    except (RuntimeError, ValueError, NotImplementedError) as refused:
        return {"attention": name, "refused": f"{type(refused).__name__}: {refused}"[:200]}
    return {"attention": name, "ms": took, "GB/s": num_bytes / took / 1e6, "largest error": error}


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run a small case once")
    tiny = parser.parse_args().tiny
    mesh = local_mesh()
    backend = GpuPagedAttention(mesh, "model")
    contestants: dict[str, Attention] = {
        "Pallas kernel": functools.partial(by_backend, backend),
        "XLA, by blocks": by_xla,
        "gathered, cuDNN": by_cudnn,
    }
    device = mesh.devices.flat[0].device_kind
    print(f"{device}, jax {importlib.metadata.version('jax')}; bytes are those of keys and values, read once\n")
    rows = []
    for name, sizes in (TINY if tiny else CASES).items():
        case = random_case(*sizes)
        for contestant, attend in contestants.items():
            rows.append({"keys": name, **measured(contestant, attend, case, 1 if tiny else CALLS)})
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()
                )
            )
    result = {"device": device, "rows": rows}
    print(json.dumps(result))
    if not tiny:
        write_result("gpu_attention", result)


if __name__ == "__main__":
    main()
