"""Hand weights over in a job of several processes, and report the cost as one line of JSON per process.

    python infra/launch.py --local 2 --devices_per_host 2 -- python tests/handoff/many_hosts.py CACHE

Each process has its own compilation cache below CACHE.

The parameters are those of a trainer in float32, with both moments, sharded over all devices. The engines' weights
are bfloat16; each host has the full model, sharded over its devices.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Generator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax._src.array import ArrayImpl

from simpo_pipeline.distributed.compilation_cache import opened_cache
from simpo_pipeline.distributed.mesh import global_mesh, local_mesh, place, training_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.handoff.handoff import build_handoff
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.joining import joined_job
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, TRAINING_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama

# 134 million parameters, 537 MB in float32; the bound on memory has to be far above the rounding of an allocator.
MODEL = LlamaConfig(1024, 4096, 8, 16, 8, 64, 8192, 64, tie_word_embeddings=True)


def digest(tree: Any) -> str:
    """Return the SHA-256 of this process's shards of all leaves."""
    whole = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            whole.update(np.asarray(shard.data).tobytes())
    return whole.hexdigest()


def pointers(tree: Any) -> list[int]:
    """Return the memory addresses of this process's shards."""
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]


def resident_bytes(which: str) -> int:
    """Return VmRSS (current) or VmHWM (peak since the last reset) of this process, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"{which}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def reset_high_water() -> None:
    """Reset VmHWM to VmRSS."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def fill(abstract: Any, seed: int) -> Any:
    """Return random values, leaf by leaf, that are the same in every process."""

    def leaf_of(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        rng = np.random.Generator(np.random.Philox(key=seed + sum(map(ord, jax.tree_util.keystr(path)))))
        return place(rng.standard_normal(leaf.shape, np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(leaf_of, abstract)


@contextlib.contextmanager
def numpy_refused() -> Generator[None]:
    """Raise an error for every array that goes through host memory while the block runs."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an array went through numpy")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ArrayImpl, "_value", property(refuse)))
        for owner, name in (
            (ArrayImpl, "__array__"),
            (ArrayImpl, "copy_to_host_async"),
            (np, "asarray"),
            (np, "array"),
        ):
            stack.enter_context(mock.patch.object(owner, name, refuse))
        yield


def main(cache_folder: str) -> None:
    with contextlib.ExitStack() as stack:
        job = stack.enter_context(joined_job(JobFlags()))
        cache = stack.enter_context(opened_cache(os.path.join(cache_folder, str(job.processes.process_index))))
        programs = Programs(job.group, cache=cache)
        source = with_shardings(abstract_llama(MODEL, np.float32), training_mesh(), TRAINING_RULES)
        target = with_shardings(abstract_llama(MODEL, jax.numpy.bfloat16), local_mesh(), TENSOR_PARALLEL_RULES)
        trainer = [fill(source, seed) for seed in (0, 1, 2)]  # parameters and both moments
        handoff = build_handoff(programs, source, target)
        assert handoff.program is not None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed earlier must not hide the memory needed now
        before, where = digest(trainer), pointers(trainer)
        reset_high_water()
        resident = resident_bytes("VmRSS")
        with numpy_refused():
            weights = handoff(trainer[0])
            jax.block_until_ready(weights.tree)
        most = resident_bytes("VmHWM")
        text = handoff.program.as_text()
        kinds = ("all-to-all", "all-gather", "all-reduce", "collective-permute")
        memory = handoff.program.memory_bytes
        found = {
            "process": job.processes.process_index,
            "trainer_bytes": sum(
                shard.data.nbytes
                for state in trainer
                for leaf in jax.tree.leaves(state)
                for shard in leaf.addressable_shards
            ),
            "copy_bytes": sum(
                shard.data.nbytes for leaf in jax.tree.leaves(weights.tree) for shard in leaf.addressable_shards
            ),
            "extra_resident_bytes": most - resident,
            "program_bytes_per_device": {
                "arguments": memory.arguments,
                "outputs": memory.outputs,
                "temporary": memory.temporary,
            },
            "collectives": {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in kinds},
            "weights": digest(weights.tree),
            "fully_addressable": all(leaf.is_fully_addressable for leaf in jax.tree.leaves(weights.tree)),
        }
        # The engine's weights are the cast parameters; the parameters keep their addresses and values.
        cast = [
            np.asarray(leaf).tobytes() == reference.astype(jax.numpy.bfloat16).tobytes()
            for leaf, reference in zip(
                jax.tree.leaves(weights.tree), jax.tree.leaves(reference_values(source)), strict=True
            )
        ]
        weights.free()
        found["global"] = hand_over_to_all(programs, source, trainer[0])
        found["cast_exactly"] = all(cast)
        found["trainer_untouched"] = digest(trainer) == before and pointers(trainer) == where
        print("FOUND " + json.dumps(found), flush=True)


def hand_over_to_all(programs: Programs, source: Any, params: Any) -> dict[str, Any]:
    """Hand the parameters over to one engine over all devices of the job, and return the findings."""
    target = with_shardings(abstract_llama(MODEL, jax.numpy.bfloat16), global_mesh(), TENSOR_PARALLEL_RULES)
    handoff = build_handoff(programs, source, target)
    assert handoff.program is not None
    with numpy_refused():
        weights = handoff(params)
        jax.block_until_ready(weights.tree)
    references = jax.tree.leaves(reference_values(source))
    cast = [
        np.asarray(shard.data).tobytes() == reference[shard.index].astype(jax.numpy.bfloat16).tobytes()
        for leaf, reference in zip(jax.tree.leaves(weights.tree), references, strict=True)
        for shard in leaf.addressable_shards
    ]
    memory = handoff.program.memory_bytes
    weights.free()
    return {
        "cast_exactly": all(cast),
        "copy_bytes_per_device": memory.outputs,
        "temporary_bytes_per_device": memory.temporary,
    }


def reference_values(abstract: Any) -> Any:
    """Return the full parameters, which every process can compute by itself."""

    def leaf_of(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=sum(map(ord, jax.tree_util.keystr(path)))))
        return rng.standard_normal(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf_of, abstract)


if __name__ == "__main__":
    main(sys.argv[1])
