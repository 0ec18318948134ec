"""Following hosts until they finish, with fake feeds and without programs."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest

from launcher.console import Console
from launcher.host_job import HostState
from launcher.options import PollTiming
from launcher.outcome import Following

RUNNING, DONE, FAILED = HostState("running"), HostState("exited", 0), HostState("exited", 4)


@dataclasses.dataclass
class PlayedFeed:
    """A fake feed that reports these states one after the other, with a line before each."""

    host: int
    states: list[HostState | Exception | None]
    was_cut: bool = False
    is_closed: bool = False

    def lines(self, first: int) -> Iterator[tuple[int, str]]:
        yield first, f"line {first}"

    def state(self) -> HostState | None:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def close(self) -> None:
        self.is_closed = True


class Clock:
    """A clock that advances by one second with every reading."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def now(self) -> float:
        return next(self._ticks)

    def sleep(self, seconds: float) -> None:
        pass

    def wait(self, event, seconds: float) -> bool:
        return event.wait(0.001)


@pytest.fixture
def follow(tmp_path):
    def run(*states: list, reach: float = 50.0):
        feeds = [PlayedFeed(host, list(reported)) for host, reported in enumerate(states)]
        timing = PollTiming(poll=1, tick=1, reach=reach, grace=2000)
        failed = Following(feeds, timing, Clock(), Console(lambda question: None), tmp_path).first_failed()
        assert all(feed.is_closed for feed in feeds)
        return failed

    return run


def test_all_hosts_have_to_exit_with_0(follow):
    assert follow([RUNNING, DONE], [DONE]) is None
    assert follow([RUNNING, DONE], [RUNNING, FAILED]).host == 1


@pytest.mark.parametrize("word", ["absent", "created", "lost", "evicted"])
def test_a_job_that_never_exited_has_not_succeeded(follow, word):
    assert follow([HostState(word)]).host == 0


def test_a_short_silence_after_a_long_quiet_time_is_tolerated(follow):
    # Silence begins with the first query without an answer, not with the last line.
    assert follow([*[RUNNING] * 200, None, DONE], reach=5) is None


def test_a_long_silence_is_not(follow):
    assert follow([RUNNING, None], reach=5).state is None


def test_a_host_that_failed_is_blamed_before_a_silent_one(follow):
    failed = follow([None], [*[RUNNING] * 100, FAILED], reach=5)
    assert (failed.host, failed.state) == (1, FAILED)


def test_the_failure_that_is_first_by_host_clocks_is_named_not_the_first_reported(follow):
    early, late = (HostState("exited", 4, ended=f"2026-01-01T00:00:00{part}") for part in ("", ".25"))
    assert follow([late], [*[RUNNING] * 20, early]).host == 1
    assert follow([early], [*[RUNNING] * 20, late]).host == 0
    assert follow([HostState("absent")], [*[RUNNING] * 20, late]).host == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_launcher_does_not_leave_it_waiting(follow):
    assert follow([DONE], [RuntimeError("a bug")]).host == 1


def test_the_last_lines_are_reported_and_kept(follow, tmp_path):
    failed = follow([*[RUNNING] * 30, FAILED])
    assert failed.last_lines == tuple(f"line {number}" for number in range(12, 32))
    assert (tmp_path / "host_0.log").read_text().splitlines()[0] == "line 1"
