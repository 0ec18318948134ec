"""Program for test_gcs.py: a producer, a borrower and a taker, each with two outputs.

python bucket_job.py PREFIX

Prints its pid, and starts when it reads a line from standard input.
"""

import os
import sys
from typing import Any

from simpo_pipeline.executor import Executor, ExecutorStep, borrow, take, this_output_path
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.executor.run import Live
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join


def publish(config: list[Any]) -> Live:
    """Write two outputs and return a live value."""
    write_text(join(config[0], "out.txt"), "published")
    write_text(join(config[0], "deep/more.txt"), "more")
    return Live("value", digest="digest")


def use(config: list[Any]) -> None:
    """Write two outputs, one of which contains the live value."""
    write_text(join(config[0], "out.txt"), f"used {config[1]}")
    write_text(join(config[0], "deep/more.txt"), "more")


def run(prefix: str) -> Executor:
    """Run the job."""
    first = ExecutorStep("first", publish, [this_output_path()])
    second = ExecutorStep("second", use, [this_output_path(), borrow(first)])
    third = ExecutorStep("third", use, [this_output_path(), take(first)])
    executor = Executor(prefix, lease=LeaseConfig(heartbeat_seconds=5.0, expiry_seconds=10.0, poll_seconds=0.05))
    executor.run([second, third])
    return executor


if __name__ == "__main__":
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    run(sys.argv[1])
