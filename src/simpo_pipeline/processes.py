"""The processes of one job as the executor sees them: the process index, a broadcast from the leader, and a gather.

Nothing here depends on how processes communicate; a job on many hosts passes its own `agree` and `gather`. The values
they transfer are None, bool, int, float, str, list and dict, so that any transport can carry them.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from simpo_pipeline import errors
from simpo_pipeline.errors import ConfigError, SimpoPipelineError, StepError

DigestT = TypeVar("DigestT", str, str | None)


def _itself(value: Any) -> Any:
    return value


def _alone(value: Any) -> list[Any]:
    return [value]


Failure = Mapping[str, Any]
"""Failure of one process: process_index, host, exception, traceback (or None)."""


@runtime_checkable
class Watch(Protocol):
    """Ends a job in every process when one of them cannot continue."""

    def phase(
        self, name: str, *, files_only: bool, on_abort: Callable[[Failure], None] | None
    ) -> AbstractContextManager[None]:
        """Report to the watch what this process does while the block runs.

        Args:
            name: Name of the phase.
            files_only: Whether the phase only works on files. Such a phase may take longer without a sign of life.
            on_abort: Called from another thread with the failure that caused the abort, before this process exits, if
                the job must end while this process is stuck.
        """
        ...

    def failed(self, failure: Failure) -> None:
        """Report that this process failed in its phase. The other processes may be stuck waiting for it."""
        ...

    def check_peers(self) -> None:
        """Raise PeerFailedError if another process is known to have failed in the current step."""
        ...

    def step_ended(self, name: str) -> None:
        """Compare what all processes did, at the end of a step. Raise in every process if they differ."""
        ...


class NoWatch:
    """Watch for a job of one process, which has no peers to observe."""

    def phase(
        self, name: str, *, files_only: bool, on_abort: Callable[[Failure], None] | None
    ) -> AbstractContextManager[None]:
        """See Watch.phase."""
        return nullcontext()

    def failed(self, failure: Failure) -> None:
        """See Watch.failed."""

    def check_peers(self) -> None:
        """See Watch.check_peers."""

    def step_ended(self, name: str) -> None:
        """See Watch.step_ended."""


@dataclass(frozen=True)
class Processes:
    """One process's view of its job. The default is a job of one process.

    Every process calls `agree` and `gather` in the same order, from the thread that called the executor.
    """

    process_index: int = 0
    process_count: int = 1
    agree: Callable[[Any], Any] = _itself
    """Returns the leader's value in every process."""
    gather: Callable[[Any], list[Any]] = _alone
    """Returns the values of all processes, by process index, in every process."""
    watch: Watch = field(default_factory=NoWatch)
    """Ensures that no process hangs."""

    def __post_init__(self) -> None:
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(
                f"process_index is {self.process_index} of {self.process_count} processes; it must be 0 or more and "
                "less than process_count."
            )

    @property
    def is_leader(self) -> bool:
        """Whether this process decides and writes for all processes."""
        return self.process_index == 0

    def leader_decides(self, decide: Callable[[], Any]) -> Any:
        """Return the result of `decide()`, which only the leader calls. If it fails, every process fails.

        Raises:
            SimpoPipelineError: `decide()` raised. The error has the same class in every process, or is a StepError if
                the class is not defined in this package.
        """
        failure: Exception | None = None
        outcome: dict[str, Any] | None = None
        if self.is_leader:
            try:
                outcome = {"value": decide(), "error": None}
            except Exception as error:
                failure = error
                outcome = {"value": None, "error": str(error), "kind": type(error).__name__}
        agreed: dict[str, Any] = self.agree(outcome)
        if isinstance(failure, SimpoPipelineError):
            raise failure
        if agreed["error"] is not None:
            kind = getattr(errors, agreed["kind"], StepError)
            raise kind(f"The leader (process 0) could not decide: {agreed['kind']}: {agreed['error']}") from failure
        return agreed["value"]


def joint_digest(digests: Sequence[DigestT]) -> DigestT | str:
    """Return one digest for all processes: the common digest if all are equal, otherwise a digest of all in order."""
    if len(set(digests)) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(str(digest) for digest in digests).encode()).hexdigest()
