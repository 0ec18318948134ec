"""The monitor: a thread in each process that ends the job in all processes if one of them cannot continue.

Each process publishes its standing a few times a second. The leader's monitor compares them. If the job has to be
stopped, it publishes a verdict, and every process ends itself, whatever its main thread is stuck in. A process that
cannot reach the coordination service also ends itself. Nothing here launches a device program.
"""

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from simpo_pipeline.distributed.config import WatchConfig
from simpo_pipeline.distributed.coordination import Coordination
from simpo_pipeline.distributed.group import ProcessGroup
from simpo_pipeline.distributed.ledger import Event
from simpo_pipeline.distributed.standing import StatusReport
from simpo_pipeline.distributed.verdict import ProcessState, Verdict, judge
from simpo_pipeline.errors import CoordinationError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.25
_VERDICT_KEY = "verdict"
_PEER_FAILURE_KEY = "peer_failure"
# How long the leader, whose process runs the coordination service, stays alive after its own verdict.
_LEADER_EXIT_DELAY_SECONDS = 1.5
# Time limit for recording the step's failure.
_RECORD_SECONDS = 10.0


@dataclasses.dataclass
class _Peer:
    """The leader's state for one process."""

    report: StatusReport | None = None
    heard_at: float = 0.0
    failed_at: float | None = None
    page: int = -1
    events: list[Event] = dataclasses.field(default_factory=list)
    """Events of that page, except the first `num_equal`, which were found equal in all processes."""
    num_equal: int = 0

    @property
    def num_read(self) -> int:
        """Number of events of the page that were read."""
        return self.num_equal + len(self.events)


class Monitor:
    """Monitor of one process and, in the leader, of the whole job, from `start` to `stop`."""

    def __init__(
        self,
        group: ProcessGroup,
        coordination: Coordination,
        watch: WatchConfig,
        end: Callable[[int], None] | None = None,
    ) -> None:
        """Create a monitor. `end` ends the process with an exit code; None selects `end_process`."""
        self._end = end or end_process
        self._group = group
        self._coordination = coordination
        self._watch = watch
        self._beat = 0
        self._published = (0, 0)  # page number, number of its events
        self._last_contact = time.monotonic()
        self._aborting = False
        self._stopped = threading.Event()
        now = time.monotonic()
        self._peers = [_Peer(heard_at=now) for _ in range(group.count)]
        self._threads = [
            threading.Thread(target=self._beat_until_stopped, name="monitor", daemon=True),
            threading.Thread(target=self._guard_until_stopped, name="monitor-guard", daemon=True),
        ]

    def start(self) -> None:
        """Start watching."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching, so that the process may exit."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT_SECONDS + 1)

    def leave(self, why: str) -> None:
        """Report to the others that this process leaves and why, and give them time to read it."""
        self._group.standing.leaving = why
        self._stopped.wait(4 * BEAT_SECONDS)

    def _beat_until_stopped(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._publish()
                if self._group.index == 0:
                    self._judge_job()
                self._check_messages()
                self._last_contact = time.monotonic()
            except CoordinationError as error:
                if not self._stopped.is_set():
                    self._abort(self._leader_is_gone(str(error)))
            except Exception as error:  # a job must not continue without its monitor
                logger.exception("the monitor failed")
                self._abort(Verdict(self._group.index, f"the monitor of this process failed: {error!r}", True))

    def _guard_until_stopped(self) -> None:
        """End this process if its monitor is stuck in a call to a frozen leader."""
        while not self._stopped.wait(BEAT_SECONDS):
            silent = time.monotonic() - self._last_contact
            if silent > self._watch.silence_seconds:
                self._abort(self._leader_is_gone(f"it has not answered for {silent:.0f} s"))

    def _leader_is_gone(self, why: str) -> Verdict:
        return Verdict(0, f"process 0 of {self._group.count}, the leader, was killed or is frozen: {why}", False)

    def _publish(self) -> None:
        page = self._group.ledger.page
        events = page.events[self._published[1] if self._published[0] == page.number else 0 :]
        start = len(page.events) - len(events) if self._published[0] == page.number else 0
        if events:
            published = [[event.identity, event.text] for event in events]
            key = f"events/{self._group.index}/{page.number}/{start}"
            self._coordination.put(key, json.dumps(published).encode())
        self._published = (page.number, start + len(events))
        self._beat += 1
        report = self._group.standing.report(self._beat, *self._published)
        if self._group.ledger.page is not page:
            return  # the page was turned in the meantime; the next beat reports the new one
        self._coordination.put(f"standing/{self._group.index}", json.dumps(dataclasses.asdict(report)).encode())

    def _judge_job(self) -> None:
        for key, data in self._coordination.list("standing/").items():
            self._read_report(int(key.rsplit("/", 1)[-1]), StatusReport(**json.loads(data)))
        now = time.monotonic()
        known = [
            ProcessState(
                report=peer.report,
                silent_seconds=now - peer.heard_at,
                failed_seconds=None if peer.failed_at is None else now - peer.failed_at,
                events=peer.events,
                num_equal=peer.num_equal,
            )
            for peer in self._peers
        ]
        self._publish_failure()
        verdict = judge(known, self._watch)
        if verdict is None:
            self._drop_equal_events()
        else:
            self._coordination.put(_VERDICT_KEY, json.dumps(dataclasses.asdict(verdict)).encode())
            self._abort(verdict)

    def _read_report(self, index: int, report: StatusReport) -> None:
        peer, now = self._peers[index], time.monotonic()
        if peer.report is not None and peer.report.beat == report.beat:
            return
        peer.heard_at = now
        if report.failure is None:
            peer.failed_at = None
        elif peer.failed_at is None:
            peer.failed_at = now
        if peer.page != report.page:
            self._coordination.delete(f"events/{index}/{peer.page}/")
            peer.page, peer.events, peer.num_equal = report.page, [], 0
        while peer.num_read < report.num_events:
            key = f"events/{index}/{report.page}/{peer.num_read}"
            data = self._coordination.get_now(key)
            if data is None:
                break
            peer.events += [Event(identity, text) for identity, text in json.loads(data)]
            self._coordination.delete(key)
        peer.report = report

    def _drop_equal_events(self) -> None:
        """Drop the events of one page that all processes reported: they were compared and are equal."""
        if len({peer.page for peer in self._peers}) > 1 or any(peer.failed_at is not None for peer in self._peers):
            return
        num_equal = min(len(peer.events) for peer in self._peers)
        for peer in self._peers:
            del peer.events[:num_equal]
            peer.num_equal += num_equal

    def _publish_failure(self) -> None:
        """Publish the failure of a process, so that work on the devices of a single process can stop early."""
        for index, peer in enumerate(self._peers):
            if peer.failed_at is not None and peer.report is not None and peer.report.failure is not None:
                text = f"process {index} of {self._group.count} failed: {peer.report.failure['exception']}"
                self._coordination.put(_PEER_FAILURE_KEY, json.dumps([peer.report.page, text]).encode())
                return

    def _check_messages(self) -> None:
        failure = self._coordination.get_now(_PEER_FAILURE_KEY)
        if failure is not None:
            page, text = json.loads(failure)
            self._group.standing.peer_failure = page, text
        verdict = self._coordination.get_now(_VERDICT_KEY)
        if verdict is not None:
            self._abort(Verdict(**json.loads(verdict)))

    def _abort(self, verdict: Verdict) -> None:
        """End this process. Its main thread may be stuck in a collective, so nothing waits for it."""
        if self._aborting:
            return
        self._aborting = True
        # Exits even if the steps below hang, for example on a full pipe or on a lock of the main thread.
        last_resort = threading.Timer(_RECORD_SECONDS + 2 * _LEADER_EXIT_DELAY_SECONDS, os._exit, [1])
        last_resort.daemon = True
        last_resort.start()
        logger.error("The job stops: %s.", verdict.message)
        if verdict.dump:
            faulthandler.dump_traceback(all_threads=True)
        if self._group.index == 0:
            self._record(verdict)
            time.sleep(_LEADER_EXIT_DELAY_SECONDS)
        self._end(1)
        last_resort.cancel()
        self._stopped.set()

    def _record(self, verdict: Verdict) -> None:
        """Let the current phase record why it ends. Storage may be unreachable, so the wait is limited."""
        on_abort = self._group.standing.phase.on_abort
        if on_abort is None:
            return
        report = self._peers[verdict.process_index].report
        failure = verdict.failure or {
            "process_index": verdict.process_index,
            "host": report.host if report is not None else "unknown",
            "exception": verdict.message,
            "traceback": None,
        }
        recording = threading.Thread(target=on_abort, args=(failure,), name="record-abort", daemon=True)
        recording.start()
        recording.join(_RECORD_SECONDS)


def end_process(code: int) -> NoReturn:
    """End the process immediately, without jax's shutdown barrier, which would wait for lost peers."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe without a reader
            stream.flush()
    os._exit(code)
