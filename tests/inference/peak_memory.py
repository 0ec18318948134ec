"""Generate with an engine, and print its given, announced and peak memory in bytes as one line of JSON.

    python tests/inference/peak_memory.py float32|bfloat16 drawing|prompts

A separate script, started by test_peak_memory.py: a process has one peak, which the compiler must not raise.
"""

import json
import pathlib
import resource
import sys

from random_weights import random_weights

from simpo_pipeline.distributed.mesh import local_mesh
from simpo_pipeline.distributed.programs import Programs, forbid_strays
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.inference.sizing import Workload, size_engine
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama

MODEL = LlamaConfig(256, 512, 4, 8, 8, 32, 4096, 2048, tie_word_embeddings=True)


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """Return the peak resident memory since the last reset, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    dtype, load = sys.argv[1:]
    forbid_strays()
    mesh, programs = local_mesh(), Programs()
    shapes = with_shardings(abstract_llama(MODEL, dtype), mesh, TENSOR_PARALLEL_RULES)
    weights = random_weights(MODEL, shapes)
    # Short sequences with a cache for long ones, which is most of the memory; or chunks of long prompts with a small
    # cache.
    prompt, num_new, given = {"drawing": (3, 40, 750_000_000), "prompts": (900, 8, 300_000_000)}[load]
    sampling = SamplingParams(num_new, temperature=0.7, top_p=0.9)
    requests = [Request((*range(prompt - 1), index), index, 0, sampling) for index in range(200 if prompt < 10 else 60)]
    config = EngineConfig(max_seqs=100, max_seq_len=1024, memory_utilization=1.0)
    sizes = size_engine(config, MODEL, dtype, Workload(200, prompt, 1024, 200_000), mesh, given)
    engine = Engine(MODEL, sizes, mesh, programs, dtype)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes() - engine.memory.weights
    engine.generate(weights, requests, step=0)
    print(json.dumps({"given": given, "announced": engine.memory.total, "taken": peak_bytes() - before}))


if __name__ == "__main__":
    main()
