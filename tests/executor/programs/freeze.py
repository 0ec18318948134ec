"""Program for test_freeze.py: runs one step and stops itself (SIGSTOP) before a chosen change of storage.

python freeze.py PREFIX NAME POINT

Prints its pid, and starts when it reads a line from standard input.
POINT counts the changes that the run itself makes. It does not count those of the heartbeat, which depend on the clock,
so a point is the same change in every run. With POINT 0 the program never stops itself. With POINT -1 it stops before
its first heartbeat. In both cases the step works until it is stopped from outside. Prints the result as JSON.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from simpo_pipeline.errors import SimpoPipelineError
from simpo_pipeline.executor import Executor, ExecutorStep
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.output_folder import OutputFolder

LEASE = LeaseConfig(heartbeat_seconds=0.25, expiry_seconds=0.5, poll_seconds=0.02)
HEARTBEAT = -1
changes = 0
heartbeats = 0


def stop_before(change: Callable[..., Any], point: int) -> Callable[..., Any]:
    """Wrap a change of storage so that the process stops before the chosen one and makes it after it is continued."""

    def changed(*arguments: Any) -> Any:
        global changes, heartbeats
        own = not threading.current_thread().name.startswith("lease-")
        changes += own
        heartbeats += not own
        if changes == point if own else point == HEARTBEAT and heartbeats == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.2)  # the signal goes to the process: this thread may still run for a moment before it stops
        return change(*arguments)

    return changed


def work(config: list[Any], output: OutputFolder) -> None:
    """Write two outputs that must come from one process, or work without end."""
    name, endless = config
    output.write_text("first.txt", name)
    while endless:
        output.write_text("endless.txt", name)
        time.sleep(0.01)
    output.write_text("second.txt", name)


def run(prefix: str, name: str, point: int) -> dict[str, Any]:
    """Run one process and return its result."""
    OutputFolder.write_text = stop_before(OutputFolder.write_text, point)
    ConditionalFiles.create = stop_before(ConditionalFiles.create, point)
    ConditionalFiles.replace = stop_before(ConditionalFiles.replace, point)
    ConditionalFiles.remove = stop_before(ConditionalFiles.remove, point)
    executor = Executor(prefix, lease=LEASE)
    step = ExecutorStep("shared", work, [name, point <= 0])
    try:
        executor.run([step])
        error = None
    except SimpoPipelineError as failure:
        error = type(failure).__name__
    actions = [result.action for result in executor.results]
    return {"error": error, "actions": actions, "changes": changes, "path": executor.output_paths[step]}


if __name__ == "__main__":
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
