"""Interface between the executor and a step function: what the function receives, and the live value it returns.

After its config, a step function may have these parameters. They are recognized by name.

    output: OutputFolder    writes to the output path, for as long as this job holds the step's lease
    run: StepRun            the processes and the session of the job; `run.output` is the same folder
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.output_folder import OutputFolder


class Action(StrEnum):
    """The action of a plan for a step."""

    RUN = "RUN"
    """Call its function and record its outputs."""
    SKIP = "SKIP"
    """Its outputs are recorded, and its live value is not needed or is still held by this process."""
    REPLAY = "REPLAY"
    """Its outputs are recorded. Call its function again with a scratch output path, only for the live value."""
    WAIT = "WAIT"
    """Another job is running it."""
    BLOCKED = "BLOCKED"
    """It cannot run in this job."""


@dataclass(frozen=True)
class PlanRow:
    """One step of a plan, with the reason for its action."""

    step_name: str
    action: Action
    reason: str
    version: str
    """Short hash of the identity, as in the output path."""
    output_path: str


@dataclass(frozen=True)
class StepRun:
    """One call of a step function."""

    name: str
    output: OutputFolder
    """Where this call writes. A scratch folder in a replay."""
    processes: Processes
    session: Any
    """The object that the experiment passed to the executor for its steps to share. The executor never inspects it."""
    plan: tuple[PlanRow, ...]
    replaying: bool
    """Whether only the live value of this call is used. Its outputs are discarded."""
    recorded_path: str = ""
    """The step's own output path. The same as that of `output`, except in a replay."""
    version: str = ""
    """Hash of the step's identity."""
    is_used_live: bool = False
    """Whether the experiment has steps that use the live value."""

    @property
    def output_path(self) -> str:
        """The path of `output`."""
        return self.output.path


@dataclass(frozen=True, eq=False)
class Live:
    """The return value of a step function that publishes a live value."""

    value: Any
    digest: str | None = None
    """Digest of the value's content. Recorded in the first run and compared in every replay."""
    free: Callable[[], None] | None = None
    """Frees the resources of the value (device buffers) when no step will use it again.

    Not called for a value that was taken, because the taker owns it then, unless the taker fails.
    """
