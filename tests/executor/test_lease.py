import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpo_pipeline.errors import ConfigError, LeaseLostError, StorageError
from simpo_pipeline.executor.records import holder as holder_module
from simpo_pipeline.executor.records import lease
from simpo_pipeline.executor.records.holder import Holder, parse_holder
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseKeeper, LeaseReader, LeaseWatch
from simpo_pipeline.storage import local_versions
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import exists, read_bytes, remove_tree, write_bytes
from simpo_pipeline.storage.paths import join

CONFIG = LeaseConfig(heartbeat_seconds=0.02, expiry_seconds=0.1, poll_seconds=0.01)
FILES = ConditionalFiles()
ELSEWHERE = Holder("other-run", "another-host", 12, "2026-01-01T00:00:00+00:00")


class Clock:
    """Clock that only advances when a test sets it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def keeper(run_id: str, clock: Clock | None = None) -> LeaseKeeper:
    """Return a keeper whose heartbeat was not started, as if its process were frozen."""
    return LeaseKeeper(run_id, CONFIG, LeaseWatch(CONFIG, clock or Clock()), FILES)


def dead_holder() -> Holder:
    """Return a holder whose process ran on this machine and has exited."""
    module = "simpo_pipeline.executor.records.holder"
    program = f"from {module} import Holder\nprint(Holder.of_this_process('dead-run').encode().decode())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    holder = parse_holder(done.stdout.encode())
    assert holder is not None
    return holder


def test_a_lease_has_one_holder_until_it_is_released(prefix):
    path = join(prefix, "step/.executor_status.lock")
    first, second = keeper("first"), keeper("second")
    assert first.acquire(path)
    assert not second.acquire(path)
    first.confirm(path)
    first.release(path)
    assert not exists(path)
    assert second.acquire(path)


def test_the_file_names_its_holder(prefix):
    path = join(prefix, "lock")
    assert keeper("first").acquire(path)
    holder = parse_holder(read_bytes(path))
    assert holder is not None
    assert (holder.run_id, holder.host_name, holder.pid) == ("first", socket.gethostname(), os.getpid())


def test_the_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(prefix):
    path = join(prefix, "lock")
    write_bytes(path, dead_holder().encode())
    assert keeper("second").acquire(path)


def test_only_a_pid_of_the_same_pid_space_shows_that_its_process_is_gone():
    dead = dead_holder()
    assert dead.is_gone()
    assert not replace(dead, pid_space="another container's").is_gone()  # although its host name and pid are the same
    assert not replace(dead, pid_space="").is_gone()
    alive = Holder.of_this_process("run")
    assert not alive.is_gone()
    assert replace(alive, started="1").is_gone()  # the pid was reused


def test_the_lease_of_another_host_is_taken_over_when_it_did_not_change_for_the_expiry(prefix):
    path = join(prefix, "lock")
    clock = Clock()
    second = keeper("second", clock)
    write_bytes(path, ELSEWHERE.encode())
    assert not second.acquire(path)
    clock.now += 0.9 * CONFIG.expiry_seconds
    assert not second.acquire(path)
    write_bytes(path, replace(ELSEWHERE, beat=1).encode())
    clock.now += 0.9 * CONFIG.expiry_seconds
    assert not second.acquire(path)
    clock.now += 1.1 * CONFIG.expiry_seconds
    assert second.acquire(path)


def test_a_clock_that_is_wrong_by_years_on_the_other_host_does_not_matter(prefix):
    path = join(prefix, "lock")
    write_bytes(path, replace(ELSEWHERE, time="1970-01-01T00:00:00+00:00").encode())
    assert not keeper("second").acquire(path)


def test_a_holder_that_lost_its_lease_learns_the_new_holder_and_leaves_the_file(prefix):
    path = join(prefix, "lock")
    first = keeper("first")
    assert first.acquire(path)
    write_bytes(path, ELSEWHERE.encode())
    with pytest.raises(LeaseLostError, match="pid 12 on host another-host"):
        first.confirm(path)
    first.release(path)
    assert read_bytes(path) == ELSEWHERE.encode()


def test_a_lease_whose_file_was_removed_or_damaged_is_lost(prefix):
    damages = {"no job: the job that took it": remove_tree, "an unknown holder": lambda path: write_bytes(path, b"")}
    for number, (owner, damage) in enumerate(damages.items()):
        path = join(prefix, f"lock-{number}")
        first = keeper("first")
        assert first.acquire(path)
        damage(path)
        with pytest.raises(LeaseLostError, match=owner):
            first.confirm(path)
        with pytest.raises(LeaseLostError):
            first.check(path)


def test_a_recent_heartbeat_is_believed_and_an_old_one_is_checked(prefix, monkeypatch):
    path = join(prefix, "lock")
    first = keeper("first")
    now = 0.0
    monkeypatch.setattr(lease, "_now", lambda: now)
    assert first.acquire(path)
    write_bytes(path, ELSEWHERE.encode())
    now = 0.9 * CONFIG.expiry_seconds  # by the rules no job can have taken it over yet
    first.check(path)
    now = CONFIG.expiry_seconds
    with pytest.raises(LeaseLostError, match="pid 12 on host another-host"):
        first.check(path)


def test_a_late_holder_whose_lease_was_not_taken_over_continues(prefix, monkeypatch):
    path = join(prefix, "lock")
    first = keeper("first")
    now = 0.0
    monkeypatch.setattr(lease, "_now", lambda: now)
    assert first.acquire(path)
    now = 10 * CONFIG.expiry_seconds
    first.check(path)


def test_the_holder_is_notified_of_its_loss_within_a_heartbeat(prefix):
    path = join(prefix, "lock")
    lost = threading.Event()
    with LeaseKeeper("first", CONFIG, LeaseWatch(CONFIG), FILES) as first:
        assert first.acquire(path)
        first.when_lost(path, lost.set)
        write_bytes(path, ELSEWHERE.encode())
        assert lost.wait(20)
    assert read_bytes(path) == ELSEWHERE.encode()


def test_the_heartbeat_changes_the_file_so_that_it_is_not_taken_over(prefix):
    path = join(prefix, "lock")
    with LeaseKeeper("first", CONFIG, LeaseWatch(CONFIG), FILES) as first:
        assert first.acquire(path)
        beats: set[int] = set()
        wait = threading.Event()
        while len(beats) < 3:
            holder = parse_holder(read_bytes(path))
            assert holder is not None
            beats.add(holder.beat)
            wait.wait(0.005)
        first.confirm(path)
    assert not exists(path)


def test_a_dead_lease_locked_by_a_stopped_process_can_be_acquired_later(tmp_path, monkeypatch):
    path = str(tmp_path / "lock")
    write_bytes(path, dead_holder().encode())
    monkeypatch.setattr(local_versions, "_LOCK_WAIT_SECONDS", 0.05)
    with local_versions.held_still(path):
        assert not keeper("second").acquire(path)
    assert keeper("second").acquire(path)


def test_a_lease_is_not_taken_over_during_a_hold(tmp_path, monkeypatch):
    path = str(tmp_path / "lock")
    first, second = keeper("first"), keeper("second", clock := Clock())
    monkeypatch.setattr(local_versions, "_LOCK_WAIT_SECONDS", 0.05)
    assert first.acquire(path)
    assert not second.acquire(path)
    clock.now += 2 * CONFIG.expiry_seconds
    with first.hold(path):
        assert not second.acquire(path)
    assert second.acquire(path)
    with pytest.raises(LeaseLostError, match="run second"), first.hold(path):
        pass


def test_heartbeats_continue_during_a_long_upload():
    path = "memory://long-upload/lock"
    with LeaseKeeper("first", CONFIG, LeaseWatch(CONFIG), FILES) as first:
        assert first.acquire(path)
        with first.hold(path):
            wait = threading.Event()
            while (holder := parse_holder(read_bytes(path))) is not None and holder.beat < 3:
                wait.wait(0.005)
        first.confirm(path)


def test_a_renewal_whose_response_was_lost_does_not_lose_the_lease(prefix, monkeypatch):
    path = join(prefix, "lock")
    first = keeper("first")
    assert first.acquire(path)
    write = ConditionalFiles.replace

    def replace_and_lose(self: ConditionalFiles, *arguments: Any) -> str | None:
        monkeypatch.undo()
        write(self, *arguments)
        raise StorageError("the answer was lost")

    for _ in range(2):
        monkeypatch.setattr(ConditionalFiles, "replace", replace_and_lose)
        with pytest.raises(StorageError, match="answer was lost"):
            first.confirm(path)
        first.confirm(path)
    monkeypatch.setattr(ConditionalFiles, "replace", replace_and_lose)
    with pytest.raises(StorageError, match="answer was lost"):
        first.confirm(path)
    first.release(path)
    assert not exists(path)


def test_a_process_hidden_from_proc_is_not_considered_gone(monkeypatch):
    monkeypatch.setattr(holder_module, "_start_time", lambda pid: None)
    assert not Holder.of_this_process("run").is_gone()
    assert replace(Holder.of_this_process("run"), pid=2**22 + 1).is_gone()


def test_a_process_other_than_the_leader_reads_the_lease_once_per_heartbeat(prefix, monkeypatch):
    path = join(prefix, "lock")
    now = 0.0
    monkeypatch.setattr(lease, "_now", lambda: now)
    assert keeper("first").acquire(path)
    reader = LeaseReader(path, "first", FILES, CONFIG.heartbeat_seconds)
    reader.check()
    write_bytes(path, ELSEWHERE.encode())
    reader.check()
    now = CONFIG.heartbeat_seconds
    with pytest.raises(LeaseLostError, match="pid 12 on host another-host"), reader.hold():
        pass


def test_only_one_of_many_jobs_acquires_a_dead_lease(tmp_path):
    path = str(tmp_path / "lock")
    write_bytes(path, dead_holder().encode())
    start = threading.Barrier(8)
    winners: list[str] = []

    def compete(run_id: str):
        start.wait()
        if keeper(run_id).acquire(path):
            winners.append(run_id)

    threads = [threading.Thread(target=compete, args=(f"run-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder = parse_holder(read_bytes(path))
    assert holder is not None
    assert winners == [holder.run_id]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["run_id", "host_name", "pid", "time", "beat"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_content_of_a_lease_file_parses_to_a_holder_or_none(data):
    holder = parse_holder(data)
    assert holder is None or (holder.pid > 0 and isinstance(holder.is_gone(), bool))


def test_a_holder_is_unchanged_after_encoding_and_parsing():
    assert parse_holder(ELSEWHERE.encode()) == ELSEWHERE


@pytest.mark.parametrize(
    "wrong",
    [
        {"poll_seconds": float("inf")},
        {"heartbeat_seconds": 0.0},
        {"heartbeat_seconds": 61.0},
        {"expiry_seconds": 29.0},
        {"poll_seconds": 0.0},
    ],
)
def test_a_heartbeat_that_cannot_keep_a_lease_is_refused(wrong):
    with pytest.raises(ConfigError, match="must be more than 0"):
        LeaseConfig(**wrong)


def test_an_expiry_beyond_what_gc_waits_for_is_refused():
    with pytest.raises(ConfigError, match="at most 1800"):
        LeaseConfig(expiry_seconds=3600.0)
