"""The process group of a job: how its processes gather values, agree on one, and compare what they did.

All communication goes through the coordination service, and none of it launches a device program. Meetings are
numbered, and each records the line that called it. If one process gathers rows while another gathers a fingerprint,
both report the mismatch.
"""

import contextlib
import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from simpo_pipeline.distributed.config import WatchConfig
from simpo_pipeline.distributed.coordination import Coordination
from simpo_pipeline.distributed.ledger import Event, Ledger, call_site, end_of_shortest, first_divergence
from simpo_pipeline.distributed.standing import OnAbort, ProcessStatus, WatchedPhase
from simpo_pipeline.errors import CoordinationError, PeerFailedError, ProgramError
from simpo_pipeline.processes import Failure

# Number of keys that a process leaves in the store before all processes meet to delete them. A job that waits for a
# step of another job calls `agree` every few seconds, for hours.
_MOST_OWN_KEYS = 100
# A long wait is split into waits of this length, so that Ctrl-C is handled. The monitor ends a process that waits in
# vain.
_LONGEST_WAIT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class _Contribution:
    """The contribution of one process to a meeting."""

    about: str
    text: str
    value: Any
    failure: Failure | None


class ProcessGroup:
    """The group of a job's processes, as seen by this process. Only one thread may use it."""

    def __init__(self, coordination: Coordination, index: int, count: int, watch: WatchConfig | None = None) -> None:
        self.index = index
        self.count = count
        self.ledger = Ledger()
        self._coordination = coordination
        self._watch = watch or WatchConfig()
        self.standing = ProcessStatus(self._watch.file_stall_seconds)
        self._num_meetings = 0
        self._own_keys: list[str] = []

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by process index, in every process. Values must be JSON.

        Raises:
            PeerFailedError: another process failed and does not reach this call.
            CoordinationError: the processes are at different points of the program; the message names all of them.
        """
        while True:
            contributions = self._meet("gather", value, range(self.count))
            if len({contribution.about for contribution in contributions}) == 1:
                self._delete_old_keys()
                return [contribution.value for contribution in contributions]
            if self.standing.failure is None:
                raise self._mismatch_error(dict(enumerate(contributions)))
            # This process failed and is ahead. The others learn of the failure here and reach the same point next.

    def agree(self, value: Any) -> Any:
        """Return the leader's value in every process. The leader does not wait for the others. Raises as `gather`."""
        indices = [0] if self.index == 0 else [0, self.index]
        contributions = self._meet("agree", value if self.index == 0 else None, indices)
        if contributions[0].about != contributions[-1].about:
            raise self._mismatch_error(dict(zip(indices, contributions, strict=True)))
        if len(self._own_keys) >= _MOST_OWN_KEYS:  # at once in all processes, which meet in the same order
            self.gather(None)
        return contributions[0].value

    def barrier(self, name: str, timeout_seconds: float) -> bool:
        """Wait until every process reaches the named barrier. Return False if the timeout expires first.

        Raises:
            CoordinationError: the coordination service is lost.
        """
        return self._coordination.barrier(name, timeout_seconds)

    @contextlib.contextmanager
    def phase(self, name: str, *, files_only: bool, on_abort: OnAbort | None) -> Generator[None]:
        """Set the phase that the monitor sees for this process inside the `with` block."""
        seconds = self._watch.file_stall_seconds if files_only else self._watch.stall_seconds
        before = self.standing.phase
        self.standing.enter(WatchedPhase(name, seconds, on_abort))
        try:
            yield
        finally:
            self.standing.enter(before)

    def failed(self, failure: Failure) -> None:
        """Report to the others that this process failed in its phase, before it meets them at the end of the phase."""
        self.standing.failure = self.ledger.page.number, failure

    def check_peers(self) -> None:
        """Raise PeerFailedError if another process is known to have failed in the current step.

        Meant for long work on this process's own devices, which would otherwise continue in vain.
        """
        failure = self.standing.peer_failure
        if failure is not None and failure[0] == self.ledger.page.number:
            raise PeerFailedError(failure[1])

    def step_ended(self, name: str) -> None:
        """Compare the launches and meetings of all processes since the end of the last step.

        After a step that failed in any process, only launches are compared. A difference is then expected and raises
        nothing; it only blocks later launches that span processes.

        Raises:
            ProgramError: the processes differ. The message names the first position at which they diverge. No program
                that spans processes can be launched afterwards.
        """
        page, failed = self.ledger.page, self.standing.failure is not None
        gathered = self.gather([page.digest(), page.launch_digest(), failed])
        anyone_failed = any(failed for _, _, failed in gathered)
        whole, launches = ({theirs[part] for theirs in gathered} for part in (0, 1))
        if len(launches) > 1 or (len(whole) > 1 and not anyone_failed):
            self.ledger.close(f"the processes diverged in step {name!r}; restart the job")
        message = self._describe_divergence(name) if len(whole) > 1 and not anyone_failed else None
        self.ledger.turn_page()  # before clearing the failure: the monitor must not see this page without it
        self.standing.failure = None
        if message is not None:
            raise ProgramError(f"{message}.")

    def _describe_divergence(self, name: str) -> str:
        gathered = self.gather([[event.identity, event.text] for event in self.ledger.page.events])
        pages = [[Event(identity, text) for identity, text in events] for events in gathered]
        position, events = first_divergence(pages) or end_of_shortest(pages)
        return describe_divergence(name, position, events)

    def _meet(self, kind: str, value: Any, indices: Sequence[int]) -> list[_Contribution]:
        """Contribute `value` to the next meeting and return the contributions of the processes in `indices`."""
        about, text = self._announce(kind)
        failure = self.standing.failure
        own = _Contribution(about, text, value, failure[1] if failure is not None else None)
        key = f"meeting/{self._num_meetings}/{self.index}"
        self._coordination.put(key, json.dumps(dataclasses.asdict(own)).encode())
        self._own_keys.append(key)
        self.standing.waiting = text
        try:
            return [self._wait_for(f"meeting/{self._num_meetings}/{index}") for index in indices]
        finally:
            self.standing.waiting = None
            self.standing.progress()

    def _announce(self, kind: str) -> tuple[str, str]:
        self._num_meetings += 1
        event = self.ledger.record_meeting(kind, call_site())
        return event.identity, event.text

    def _wait_for(self, key: str) -> _Contribution:
        while (data := self._coordination.get(key, _LONGEST_WAIT_SECONDS)) is None:
            pass
        return _Contribution(**json.loads(data))

    def _delete_old_keys(self) -> None:
        """Delete the keys of earlier meetings: every process that reached this meeting has read them."""
        while len(self._own_keys) > 1:
            self._coordination.delete(self._own_keys.pop(0))

    def _mismatch_error(self, contributions: Mapping[int, _Contribution]) -> CoordinationError:
        for index, contribution in contributions.items():
            if contribution.failure is not None:
                return PeerFailedError(
                    f"process {index} of {self.count} failed, so this one stopped: {contribution.failure['exception']}"
                )
        points = "; ".join(f"process {index} {there.text}" for index, there in contributions.items())
        return CoordinationError(
            f"the processes of the job are at different points: {points}. Every process must take the same steps in "
            "the same order; look for a decision that depends on the process, the clock or a file on one host."
        )


def describe_divergence(step_name: str, position: int, events: Sequence[Event | None]) -> str:
    """Describe what each process did at the first position at which the processes diverge."""
    did = "; ".join(
        f"process {index} {event if event is not None else 'did nothing more'}" for index, event in enumerate(events)
    )
    return (
        f"the processes diverged in {step_name!r}, at shared event {position}: {did}. On a pod this halts the chips. "
        "Every process must launch the same programs in the same order"
    )
