"""The processes of one job as the executor sees them: who am I, what does the leader say, what does everyone say.

Nothing here knows how processes talk; a job on many hosts passes its own `agree` and `gather`. Values that go through
them are None, bool, int, float, str, list and dict, so that any transport can carry them.
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
"""How one process failed: process_index, host, exception, traceback (or None)."""


@runtime_checkable
class Watch(Protocol):
    """What ends a job in every process when one of them cannot go on."""

    def phase(
        self, name: str, *, files_only: bool, on_abort: Callable[[Failure], None] | None
    ) -> AbstractContextManager[None]:
        """Tells the watch what this process does while the block runs.

        `files_only` work may take longer without a sign of life. Should the job have to be ended while this process
        is stuck, `on_abort` is called with the failure to blame, from another thread, before the process goes.
        """
        ...

    def failed(self, failure: Failure) -> None:
        """This process failed in its phase; the others may be stuck waiting for it."""
        ...

    def check_peers(self) -> None:
        """Raises PeerFailedError when another process is known to have failed in the current step."""
        ...

    def step_ended(self, name: str) -> None:
        """All processes are at the end of a step: compare what they did. Raises where they differ, in all."""
        ...


class NoWatch:
    """For a job of one process: whatever happens to it happens to the job."""

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
    """One process's view of its job; the default is a job of one process.

    Every process calls `agree` and `gather` in the same order, from the thread that called the executor.
    """

    process_index: int = 0
    process_count: int = 1
    agree: Callable[[Any], Any] = _itself
    """The leader's value, in every process."""
    gather: Callable[[Any], list[Any]] = _alone
    """The values of all processes, by process index, in every process."""
    watch: Watch = field(default_factory=NoWatch)
    """What sees to it that nobody waits for ever."""

    def __post_init__(self) -> None:
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(
                f"process_index is {self.process_index} of {self.process_count} processes; it must be 0 or more and "
                "less than process_count."
            )

    @property
    def is_leader(self) -> bool:
        """Whether this process decides and writes for all."""
        return self.process_index == 0

    def leader_decides(self, decide: Callable[[], Any]) -> Any:
        """What `decide()` gave in the leader; it is called nowhere else, and its failure is everyone's failure.

        Raises:
            SimpoPipelineError: what `decide()` raised, of the same class in every process; a StepError if it is not
                one of ours.
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
    """One digest for the values of all processes: theirs if they are equal, else one over all in order."""
    if len(set(digests)) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(str(digest) for digest in digests).encode()).hexdigest()
