"""Removal of checkpoints below a step's output path. The executor only knows where they are and when to remove them.

A step function that can resume writes and reads its checkpoints. They are not outputs. They are removed once the step
and every step that uses its live value have SUCCESS. Until then a replay may resume from them.
"""

import logging

from simpo_pipeline.executor.records.lease import LeaseFence, LeaseKeeper
from simpo_pipeline.executor.records.status import CHECKPOINTS_FOLDER, LEASE_FILE
from simpo_pipeline.storage.files import remove_tree
from simpo_pipeline.storage.paths import join

_logger = logging.getLogger("simpo_pipeline.executor")


def remove_checkpoints(output_path: str, leases: LeaseKeeper) -> None:
    """Remove all checkpoints of a step, whose lease this job must hold.

    Raises:
        LeaseLostError: Another job took the lease, so the checkpoints may be its own.
    """
    fence = LeaseFence(leases, join(output_path, LEASE_FILE))
    fence.check()
    remove_tree(join(output_path, CHECKPOINTS_FOLDER), fence)


def remove_unused_checkpoints(output_path: str, leases: LeaseKeeper) -> None:
    """Remove the checkpoints of a step that cannot be resumed any more, unless another job holds its lease."""
    lease = join(output_path, LEASE_FILE)
    if not leases.acquire(lease):
        _logger.info("keeping the checkpoints in %s, because another job holds the step", output_path)
        return
    try:
        remove_checkpoints(output_path, leases)
    finally:
        leases.release(lease)
