"""One process of the many-process case of `handoff.py`, which starts it; process 0 prints one line of JSON.

The parameters of SmolLM2 in float32 are sharded over all devices of the job, as in a trainer. Each host gets the whole
model, sharded over its own devices.
"""

import json
import re
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from simpo_pipeline.distributed.mesh import local_mesh, training_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.handoff.handoff import build_handoff
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.joining import joined_job
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, TRAINING_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama

ROUNDS = 5
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter")


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of a pytree on the first device of this process."""
    first = jax.local_devices()[0]
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def main() -> None:
    model_path = sys.argv[1]
    figures: dict[str, Any] = {}
    with joined_job(JobFlags()) as job:
        programs = Programs(job.group)
        model = load_config(model_path)
        source = with_shardings(abstract_llama(model, jnp.float32), training_mesh(), TRAINING_RULES)
        params = load_weights(model_path, source)
        for dtype in ("float32", "bfloat16"):
            target = with_shardings(abstract_llama(model, jnp.dtype(dtype)), local_mesh(), TENSOR_PARALLEL_RULES)
            handoff = build_handoff(programs, source, target)
            assert handoff.program is not None
            handoff(params).free()
            seconds: list[float] = []
            size = 0
            for _ in range(ROUNDS):
                job.processes.gather("all are ready")
                start = time.perf_counter()
                weights = handoff(params)
                jax.block_until_ready(weights.tree)
                seconds.append(max(job.processes.gather(time.perf_counter() - start)))
                size = bytes_per_device(weights.tree)
                weights.free()
            text = handoff.program.as_text()
            figures[dtype] = {
                "seconds": statistics.median(seconds),
                "bytes per device": size,
                "GB/s per device": size / statistics.median(seconds) / 1e9,
                "temporary bytes per device": handoff.program.memory_bytes.temporary,
                "collectives": {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES},
            }
        if job.processes.is_leader:
            print("FIGURES " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
