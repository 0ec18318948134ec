"""The processes of one job, as each of them sees it: they gather, agree, and compare what they did.

All of it goes through the coordination service, and none of it launches a device program. Meetings are numbered, and
each says from which line it was called: where one process gathers rows and another a fingerprint, both are told so.
"""

import contextlib
import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from simpo_pipeline.distributed.config import WatchConfig
from simpo_pipeline.distributed.coordination import Coordination
from simpo_pipeline.distributed.ledger import Event, Ledger, call_site, end_of_shortest, first_parting
from simpo_pipeline.distributed.standing import Failure, OnAbort, Phase, Standing
from simpo_pipeline.errors import CoordinationError, PeerFailedError, ProgramError

# So many keys a process leaves in the store before all meet to delete them: a job that waits for another one's step
# agrees every few seconds that it still waits, for hours.
_MOST_OWN_KEYS = 100
# A wait is made of waits of this length, so that Ctrl-C gets through. Who waits in vain is ended by the monitor.
_LONGEST_WAIT_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class _Contribution:
    """What one process brought to a meeting."""

    about: str
    text: str
    value: Any
    failure: Failure | None


class ProcessGroup:
    """This process among the others of its job. Used by one thread."""

    def __init__(self, coordination: Coordination, index: int, count: int, watch: WatchConfig | None = None) -> None:
        self.index = index
        self.count = count
        self.ledger = Ledger()
        self._coordination = coordination
        self._watch = watch or WatchConfig()
        self.standing = Standing(self._watch.file_stall_seconds)
        self._num_meetings = 0
        self._own_keys: list[str] = []

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by index, in every process; values are JSON.

        Raises:
            PeerFailedError: another process failed and does not come.
            CoordinationError: the processes are at different places of the program; all are named.
        """
        while True:
            contributions = self._meet("gather", value, range(self.count))
            if len({contribution.about for contribution in contributions}) == 1:
                self._delete_old_keys()
                return [contribution.value for contribution in contributions]
            if self.standing.failure is None:
                raise self._parted(dict(enumerate(contributions)))
            # This process failed and is ahead; the others learn of it here, and come to the same place next.

    def agree(self, value: Any) -> Any:
        """The leader's value, in every process; the leader does not wait for the others. Raises as `gather`."""
        whom = [0] if self.index == 0 else [0, self.index]
        contributions = self._meet("agree", value if self.index == 0 else None, whom)
        if contributions[0].about != contributions[-1].about:
            raise self._parted(dict(zip(whom, contributions, strict=True)))
        if len(self._own_keys) >= _MOST_OWN_KEYS:  # in every process at once, since all meet in the same order
            self.gather(None)
        return contributions[0].value

    def barrier(self, name: str, timeout_seconds: float) -> bool:
        """Waits until every process has come to the barrier of that name; False when they do not in time.

        Raises:
            CoordinationError: the coordination service is lost.
        """
        return self._coordination.barrier(name, timeout_seconds)

    @contextlib.contextmanager
    def phase(self, name: str, *, files_only: bool, on_abort: OnAbort | None) -> Generator[None]:
        """Tells the watchdog what this process does while the block runs."""
        seconds = self._watch.file_stall_seconds if files_only else self._watch.stall_seconds
        before = self.standing.phase
        self.standing.enter(Phase(name, seconds, on_abort))
        try:
            yield
        finally:
            self.standing.enter(before)

    def failed(self, failure: Failure) -> None:
        """Tells the others that this process failed in its phase, before it meets them at the phase's end."""
        self.standing.failure = self.ledger.page.number, failure

    def check_peers(self) -> None:
        """Raises PeerFailedError when another process is known to have failed in the current step.

        For long work on this process's own devices, which would otherwise go on in vain.
        """
        failure = self.standing.peer_failure
        if failure is not None and failure[0] == self.ledger.page.number:
            raise PeerFailedError(failure[1])

    def step_ended(self, name: str) -> None:
        """Compares what every process launched, and where they met, since the last step's end.

        After a step that failed somewhere only launches count, and a difference is no news: then it merely bars the
        launches to come.

        Raises:
            ProgramError: they differ; the first position at which they part is named. No program over many processes
                can be launched any more.
        """
        page, failed = self.ledger.page, self.standing.failure is not None
        told = self.gather([page.digest(), page.launch_digest(), failed])
        anyone_failed = any(failed for _, _, failed in told)
        whole, launches = ({page_told[part] for page_told in told} for part in (0, 1))
        if len(launches) > 1 or (len(whole) > 1 and not anyone_failed):
            self.ledger.close(f"the processes parted in step {name!r}; start the job again")
        message = self._describe_parting(name) if len(whole) > 1 and not anyone_failed else None
        self.ledger.turn_page()  # first: the monitor must not see this page without its failure
        self.standing.failure = None
        if message is not None:
            raise ProgramError(f"{message}.")

    def _describe_parting(self, name: str) -> str:
        told = self.gather([[event.identity, event.text] for event in self.ledger.page.events])
        pages = [[Event(identity, text) for identity, text in events] for events in told]
        position, events = first_parting(pages) or end_of_shortest(pages)
        return describe_parting(name, position, events)

    def _meet(self, kind: str, value: Any, whom: Sequence[int]) -> list[_Contribution]:
        """Brings `value`, and returns what each of `whom` brought to the same meeting."""
        about, text = self._announce(kind)
        failure = self.standing.failure
        own = _Contribution(about, text, value, failure[1] if failure is not None else None)
        key = f"meeting/{self._num_meetings}/{self.index}"
        self._coordination.put(key, json.dumps(dataclasses.asdict(own)).encode())
        self._own_keys.append(key)
        self.standing.waiting = text
        try:
            return [self._wait_for(f"meeting/{self._num_meetings}/{index}") for index in whom]
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
        """Deletes what all have read: who came to this meeting has read everything of those before."""
        while len(self._own_keys) > 1:
            self._coordination.delete(self._own_keys.pop(0))

    def _parted(self, contributions: Mapping[int, _Contribution]) -> CoordinationError:
        for index, contribution in contributions.items():
            if contribution.failure is not None:
                return PeerFailedError(
                    f"process {index} of {self.count} failed, so this one stopped: {contribution.failure['exception']}"
                )
        places = "; ".join(f"process {index} {there.text}" for index, there in contributions.items())
        return CoordinationError(
            f"the processes of the job are at different places: {places}. Every process must take the same steps in "
            "the same order; look for a decision that depends on the process, the clock or a file of one host."
        )


def describe_parting(step_name: str, position: int, events: Sequence[Event | None]) -> str:
    """What two or more processes did at the first position at which they part."""
    did = "; ".join(
        f"process {index} {event if event is not None else 'did nothing more'}" for index, event in enumerate(events)
    )
    return (
        f"the processes parted in {step_name!r}, at number {position} of what they do together: {did}. On a pod this "
        "halts the chips. Every process must launch the same programs in the same order"
    )
