"""Our engine on one GPU, with random bfloat16 weights in the shapes of Llama models, compared with memory bandwidth.

    uv run --extra gpu python benchmarks/gpu_generation.py        # minutes on one H100 or H200, mostly compiling
    uv run python benchmarks/gpu_generation.py --models tiny --num_prompts 4 --max_tokens 8    # check that it runs

Every sequence draws `--max_tokens` tokens at temperature 1 from a unique prompt of 64 random tokens, and none finishes
earlier. The floor is the least number of bytes that must be read from memory, divided by the measured bandwidth of
the GPU: each step reads the matrices and the keys and values of all sequences once. First, a tiny model in float32,
with matmuls at full precision, draws the same requests on the GPU and on the CPU, with preemptions. It prints a table
and one JSON line. Without the model `tiny`, it also writes benchmarks/results/gpu_generation.json.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from result_files import write_result

from simpo_pipeline.distributed.mesh import Device, local_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.inference.config import EngineConfig, EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine, GenerationStats
from simpo_pipeline.inference.sequence import Completion, Request
from simpo_pipeline.inference.sizing import Workload, available_memory_bytes, size_engine
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama, init_llama
from simpo_pipeline.preflight.roofline import generation_work

_LLAMA_3 = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_seq_len=131072,
    rope_theta=500_000.0,
)
MODELS = {
    "Llama-3.1-8B": _LLAMA_3,
    "Llama-3.2-1B": dataclasses.replace(
        _LLAMA_3, hidden_size=2048, intermediate_size=8192, num_layers=16, head_dim=64, tie_word_embeddings=True
    ),
    "tiny": dataclasses.replace(
        _LLAMA_3, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
    ),
}
PROMPT_TOKENS = 64
DTYPE = jnp.bfloat16
# Size of the array that is read to measure the bandwidth of the GPU: larger than its caches.
READ_BYTES = 4 * 2**30


def read_bytes_per_second(num_bytes: int, rounds: int = 5, reads: int = 10) -> float:
    """Return the bandwidth of summing one large array, the best of a few rounds."""
    array = jax.block_until_ready(jax.jit(lambda: jnp.ones((num_bytes // 4,), jnp.float32))())
    add_up = jax.jit(jnp.sum)
    jax.block_until_ready(add_up(array))
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready([add_up(array) for _ in range(reads)])
        took.append((time.perf_counter() - start) / reads)
    return num_bytes / min(took)


def random_weights(model: LlamaConfig, mesh: Mesh) -> Llama:
    """Return weights drawn on the devices of the mesh."""
    placed = with_shardings(abstract_llama(model, DTYPE), mesh, TENSOR_PARALLEL_RULES)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)

    def draw(key: jax.Array) -> Llama:
        return jax.tree.map(lambda leaf: leaf.astype(DTYPE), init_llama(model, key))

    return jax.block_until_ready(jax.jit(draw, out_shardings=shardings)(np.array([0, 1], np.uint32)))


def same_on_cpu() -> str:
    """Return how many requests of a tiny model in float32 get the same tokens on this device and on the CPU."""
    rng = np.random.default_rng(0)
    lengths = zip(rng.integers(1, 1100, 24).tolist(), rng.integers(1, 100, 24).tolist(), strict=True)
    requests = [
        # Greedy and sampled requests alternate.
        Request(tuple(rng.integers(0, 512, size).tolist()), index, 0, SamplingParams(num_new, float(index % 2)))
        for index, (size, num_new) in enumerate(lengths)
    ]
    with jax.default_matmul_precision("highest"):
        (ours, stats), (cpus, _) = (served_on(each, requests) for each in (jax.devices()[0], jax.devices("cpu")[0]))
    num_equal = sum(a.tokens == b.tokens for a, b in zip(ours, cpus, strict=True))
    return f"{num_equal} of {len(requests)} requests ({stats.num_preemptions} preemptions)"


def served_on(device: Device, requests: list[Request]) -> tuple[list[Completion], GenerationStats]:
    """Serve the requests with a tiny model in float32 with a vocabulary of 512, whose pages run out."""
    model = dataclasses.replace(MODELS["tiny"], vocab_size=512, num_heads=6, num_kv_heads=2, head_dim=64)
    mesh = local_mesh([device])
    sizes = EngineSizes(16, 1280, page_size=16, num_pages=200, prefill_chunk_tokens=512, decode_steps_per_call=8)
    rng = np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.normal(size=leaf.shape).astype(np.float32) / 4, leaf.sharding)

    weights = jax.tree.map(draw, with_shardings(abstract_llama(model, "float32"), mesh, TENSOR_PARALLEL_RULES))
    return Engine(model, sizes, mesh, Programs(), "float32").generate(weights, requests, step=0)


def floor_seconds(model: LlamaConfig, num_prompts: int, max_tokens: int, bytes_per_second: float) -> float:
    """Return the minimum time of the decode steps, each of which reads all keys and values of its sequences so far."""
    steps = (
        generation_work(model, num_prompts, num_prompts, num_prompts * length, length, DTYPE.dtype.itemsize)
        for length in range(PROMPT_TOKENS, PROMPT_TOKENS + max_tokens)
    )
    return sum(step.hbm_bytes for step in steps) / bytes_per_second


def measured(name: str, num_prompts: int, max_tokens: int, rounds: int, bytes_per_second: float) -> dict[str, Any]:
    """Return one row of the table."""
    model, mesh = MODELS[name], local_mesh()
    longest = PROMPT_TOKENS + max_tokens
    work = Workload(num_prompts, PROMPT_TOKENS, longest, num_prompts * longest)
    config = EngineConfig(max_seqs=num_prompts, decode_steps_per_call=32)
    sizes = size_engine(config, model, DTYPE, work, mesh, available_memory_bytes(mesh))
    start = time.perf_counter()
    engine = Engine(model, sizes, mesh, Programs(), DTYPE)
    compile_seconds = time.perf_counter() - start
    laid_out = jax.block_until_ready(engine.lay_out(random_weights(model, mesh)))
    rng = np.random.default_rng(0)

    def requests(num_tokens: int) -> list[Request]:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=1.0)
        prompts = rng.integers(0, model.vocab_size, (num_prompts, PROMPT_TOKENS)).tolist()
        return [Request(tuple(prompt), index, 0, sampling) for index, prompt in enumerate(prompts)]

    engine.generate(laid_out, requests(min(64, max_tokens)), step=0)
    calls = []
    for _ in range(rounds):
        start = time.perf_counter()
        completions, stats = engine.generate(laid_out, requests(max_tokens), step=0)
        calls.append((time.perf_counter() - start, stats))
        assert all(len(completion.tokens) == max_tokens for completion in completions)
    seconds = statistics.median(wall for wall, _ in calls)
    stats = calls[-1][1]
    floor = floor_seconds(model, num_prompts, max_tokens, bytes_per_second)
    return {
        "model": name,
        "prompts x tokens": f"{num_prompts} x {max_tokens}",
        "wall s": seconds,
        "tok/s": num_prompts * max_tokens / seconds,
        "floor s": floor,
        "of the floor's speed": floor / seconds,
        "prefill s": stats.prefill_seconds,
        "decode s": stats.decode_seconds,
        "preemptions": stats.num_preemptions,
        "compile s": compile_seconds,
        "announced GiB": engine.memory.total / 2**30,
        "peak GiB": (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
    }


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Llama-3.1-8B", "Llama-3.2-1B"])
    parser.add_argument("--num_prompts", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=2, help="timed calls, after an untimed one of 64 tokens")
    arguments = parser.parse_args()
    device = jax.devices()[0].device_kind
    bytes_per_second = read_bytes_per_second(READ_BYTES if device != "cpu" else 2**24)
    versions = f"jax {importlib.metadata.version('jax')}"
    same = same_on_cpu()
    print(f"{device}, {versions}; it reads {bytes_per_second / 1e9:.0f} GB/s")
    print(f"Same tokens as on the CPU, tiny model in float32: {same}\n", flush=True)
    rows = []
    for name in arguments.models:
        rows.append(measured(name, arguments.num_prompts, arguments.max_tokens, arguments.rounds, bytes_per_second))
        for key, value in rows[-1].items():
            print(f"{key:>22} {value:.4g}" if isinstance(value, float) else f"{key:>22} {value}", flush=True)
        print(flush=True)
    result = {"device": device, "versions": versions, "bytes/s": bytes_per_second, "same": same, "rows": rows}
    print(json.dumps(result))
    if "tiny" not in arguments.models:
        write_result("gpu_generation", result)


if __name__ == "__main__":
    main()
