"""Checkpoints below a step's output path: what the executor knows of them is where they lie and when they go.

A step function that can resume writes them and reads them; they are no outputs. They go when the step has SUCCESS and
every step that uses its live value has it too: until then a replay may resume from them.
"""

import logging

from simpo_pipeline.executor.records.lease import LeaseKeeper
from simpo_pipeline.executor.records.status import CHECKPOINTS_FOLDER, LEASE_FILE
from simpo_pipeline.storage.files import remove_tree
from simpo_pipeline.storage.paths import join

_logger = logging.getLogger("simpo_pipeline.executor")


def remove_checkpoints(output_path: str) -> None:
    """Remove all of a step's checkpoints; the caller holds its lease."""
    remove_tree(join(output_path, CHECKPOINTS_FOLDER))


def remove_unused_checkpoints(output_path: str, leases: LeaseKeeper) -> None:
    """Remove those of a step that nobody may resume from any more, unless another job is at work on it."""
    lease = join(output_path, LEASE_FILE)
    if not leases.acquire(lease):
        _logger.info("the checkpoints in %s stay: another job has the step", output_path)
        return
    try:
        remove_checkpoints(output_path)
    finally:
        leases.release(lease)
