"""One program of several collectives, compiled through the cache in a job of many processes and run.

    compiled_alike.py CACHE

Each process has a cache of its own below CACHE, and reports what it did as one line of JSON.
"""

import json
import os
import sys

import jax
import numpy as np

from simpo_pipeline.distributed.compilation_cache import opened_cache
from simpo_pipeline.distributed.mesh import DATA_AXIS, place, training_mesh
from simpo_pipeline.distributed.programs import Programs
from steps.joined_job import joined_job
from steps.session import JobFlags

# A host that runs the gathers of these in another order sends an array of one size where another is expected.
WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)


def main(folder: str) -> None:
    with joined_job(JobFlags()) as job:
        index = job.processes.process_index
        mesh = training_mesh()
        split, whole = (jax.NamedSharding(mesh, jax.P(axis), memory_kind=None) for axis in (DATA_AXIS, None))
        arrays = [np.arange(8 * width, dtype=np.float32).reshape(8, width) for width in WIDTHS]
        abstract = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split) for array in arrays]
        with opened_cache(os.path.join(folder, str(index))) as cache:
            assert cache is not None
            programs = Programs(job.group, cache=cache)
            program = programs.compile("gathers", lambda arrays: [x + 1 for x in arrays], abstract, out_shardings=whole)
            results = program(place(arrays, split))
            is_right = all(
                np.array_equal(shard.data, array + 1)
                for result, array in zip(results, arrays, strict=True)
                for shard in result.addressable_shards
            )
            counts = {"hits": cache.counts.hits, "misses": cache.counts.misses}
        print("FOUND " + json.dumps({"is_right": is_right, **counts}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
