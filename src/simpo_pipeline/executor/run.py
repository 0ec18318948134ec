"""What goes between the executor and a step function: the run it is given, and the live value it returns.

A step function is given its `StepRun` when it names a second parameter `run`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from simpo_pipeline.processes import Processes


class Action(StrEnum):
    """What the plan does with a step."""

    RUN = "RUN"
    """Call its function and record its outputs."""
    SKIP = "SKIP"
    """Its outputs are recorded and nobody needs its live value."""
    REPLAY = "REPLAY"
    """Its outputs are recorded; call its function again, aside, for the live value alone."""
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
    output_path: str
    """Where this call writes; a scratch path while replaying."""
    processes: Processes
    session: Any
    """What the experiment gave the executor for its steps to share; the executor never looks inside."""
    plan: tuple[PlanRow, ...]
    replaying: bool
    """Whether only the live value of this call counts; its outputs will be thrown away."""
    recorded_path: str = ""
    """The step's own output path: `output_path`, but of a replay."""
    version: str = ""
    """Hash of the step's identity."""
    is_used_live: bool = False
    """Whether the experiment has steps that use the live value."""


@dataclass(frozen=True, eq=False)
class Live:
    """What a step function returns to publish a live value."""

    value: Any
    digest: str | None = None
    """Names the value's content; recorded at the first run and compared at every replay."""
    free: Callable[[], None] | None = None
    """Releases what the value holds (device buffers) when no step will use it again. Not called once it is taken,
    because the taker owns it then, unless the taker fails."""
