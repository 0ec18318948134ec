"""The processes of one job as the executor sees them: who am I, what does the leader say, what does everyone say.

Nothing here knows how processes talk; a job on many hosts passes its own `agree` and `gather`. Values that go through
them are None, bool, int, float, str, list and dict, so that any transport can carry them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simpo_pipeline.errors import ConfigError, SimpoPipelineError, StepError


def _itself(value: Any) -> Any:
    return value


def _alone(value: Any) -> list[Any]:
    return [value]


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
            SimpoPipelineError: in the leader, what `decide()` raised, made a StepError if it is not one of ours.
            StepError: in the other processes, then.
        """
        failure: Exception | None = None
        outcome: dict[str, Any] | None = None
        if self.is_leader:
            try:
                outcome = {"value": decide(), "error": None}
            except Exception as error:
                failure = error
                outcome = {"value": None, "error": f"{type(error).__name__}: {error}"}
        agreed: dict[str, Any] = self.agree(outcome)
        if isinstance(failure, SimpoPipelineError):
            raise failure
        if agreed["error"] is not None:
            raise StepError(f"The leader (process 0) could not decide: {agreed['error']}") from failure
        return agreed["value"]
