"""Jobs of real processes launch equal shared programs, and a fault in one process ends all of them.

The job is `toy_job.py`, which has the structure of M11: train-2 ==live==> infer (borrows) ==> train-5 (takes).
"""

import json
import pathlib
import re

import pytest

TOY = "tests/distributed/toy_job.py"
# Seconds after the fault within which every process must be gone.
STRAY_SECONDS = 10
LOSS_SECONDS = 45


def output(prefix: pathlib.Path, step: str) -> pathlib.Path:
    (folder,) = prefix.glob(f"{step}-*")
    return folder


def status(prefix: pathlib.Path, step: str) -> str:
    return (output(prefix, step) / ".executor_status").read_text()


def digest(prefix: pathlib.Path) -> str:
    return json.loads((output(prefix, "train-5") / "summary.json").read_text())["state_digest"]


def first_fault(job) -> float:
    return min(float(match[1]) for match in re.finditer(r"FAULT (\d+\.\d+)", job.text))


def ledgers_of(job, host: int) -> tuple[int, str, int]:
    """Return what a process reports about its launches at the end.

    Returns:
        The number of launches over many processes, their digest, and the number of launches on its own devices.
    """
    text = "\n".join(job.lines(host))
    (found,) = re.findall(r"launched (\d+) programs over many processes \(ledger (\w+)\) and (\d+) on", text)
    return int(found[0]), found[1], int(found[2])


@pytest.fixture(scope="module")
def clean_digest(launch, tmp_path_factory) -> str:
    """Return the state digest of two processes without a fault."""
    prefix = tmp_path_factory.mktemp("clean")
    launch(2, TOY, "--prefix", prefix).require_success()
    return digest(prefix)


@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_process_launches_the_same_programs_over_many_processes(launch, tmp_path, count):
    job = launch(count, TOY, "--prefix", tmp_path, "--check_launches").require_success()
    launches = [ledgers_of(job, host) for host in range(count)]
    print(f"{count} processes, (launches over many processes, their digest, launches on own devices): {launches}")
    assert len({(number, name) for number, name, _ in launches}) == 1
    assert launches[0][0] == (7 if count > 1 else 0)
    # Hosts generate for unequal shards: 3 programs on the first host, and 2 more on each later host.
    own_updates = 0 if count > 1 else 7
    assert [local for _, _, local in launches] == [3 + 2 * index + own_updates for index in range(count)]


@pytest.mark.parametrize(
    ("fault", "culprit"),
    [
        pytest.param(
            *(
                "ambient_zeros",
                r"process 0 of 2.*JAX tried to execute function jit\(.*toy_job\.py:\d+ in ambient_zeros",
            ),
            marks=pytest.mark.slow,
        ),
        ("eager_op", r"process 0 of 2.*JAX tried to execute function jit\(_reduce_sum\).*toy_job\.py:\d+ in eager_op"),
        pytest.param(
            *("device_tracker", r"process 0 of 2.*JAX tried to execute function jit\(.*toy_job\.py:\d+ in log"),
            marks=pytest.mark.slow,
        ),
        (
            "other_constant",
            r"program 'update' of process 1 is not program 'update' of process 0: StableHLO differs at line \d+, "
            r"'.*dense<1\.250000e-01>.*' in process 0 and '.*dense<5\.000000e-01>.*' there. Nothing was launched",
        ),
        ("other_order", r"process 0 launched 'other_update' \(__main__:\d+\); process 1 launched 'update' \(__main__"),
        ("skip", r"process 0 reached gather \(__main__:\d+\); process 1 launched 'update' \(__main__:\d+\)"),
    ],
)
def test_a_divergence_of_one_host_stops_the_job_and_is_named(launch, tmp_path, fault, culprit):
    job = launch(2, TOY, "--prefix", tmp_path, "--fault", fault)
    assert job.exit_code == 1, job.text
    assert job.ended - first_fault(job) < STRAY_SECONDS, job.text
    for host in (0, 1):
        assert re.search(culprit, "\n".join(job.lines(host))), job.text
    assert status(tmp_path, "train-5") == "FAILED"
    assert re.search(culprit.replace("'", r"\\?'"), (output(tmp_path, "train-5") / "error.json").read_text())
    assert status(tmp_path, "infer") == "SUCCESS"


def test_launches_can_be_compared_before_they_are_made(launch, tmp_path):
    job = launch(2, TOY, "--prefix", tmp_path, "--fault", "other_order", "--check_launches")
    assert job.exit_code == 1
    assert re.search(
        r"process 0 would launch 'other_update' .*; process 1 would launch 'update'.*at __main__", job.text
    )
    assert "Nothing was launched" in job.text


@pytest.mark.slow
def test_the_leader_has_time_to_close_its_tracker_when_all_processes_fail(launch, tmp_path):
    words = ("--fault", "raise_with_slow_tracker", "--fault_step", "infer", "--victim", 1)
    job = launch(2, TOY, "--prefix", tmp_path, *words)
    assert job.exit_code == 1
    assert "UPLOADED" in job.lines(0), job.text
    assert "left the job" not in job.text
    assert all(any("The job failed." in line for line in job.lines(host)) for host in (0, 1))


@pytest.mark.slow
def test_a_host_that_leaves_alone_is_named_and_ends_the_job(launch, tmp_path):
    job = launch(2, TOY, "--prefix", tmp_path, "--fault", "interrupt", "--victim", 1)
    assert job.exit_code in (1, 130)
    assert job.ended - first_fault(job) < LOSS_SECONDS
    assert re.search(r"process 1 of 2, pid \d+\) left the job: KeyboardInterrupt", "\n".join(job.lines(0))), job.text
    assert status(tmp_path, "train-5") == "FAILED"


@pytest.mark.parametrize(
    ("fault", "step", "victim", "flags"),
    [
        pytest.param("raise", "infer", 1, (), marks=pytest.mark.slow),
        ("kill", "infer", 0, ()),
        pytest.param("raise", "infer", 0, (), marks=pytest.mark.slow),
        pytest.param("hang", "infer", 1, ("--watch.stall_seconds", "4"), marks=pytest.mark.slow),
        pytest.param("raise", "train-5", 0, (), marks=pytest.mark.slow),
        pytest.param("raise", "train-5", 1, (), marks=pytest.mark.slow),
        pytest.param("kill", "train-5", 1, (), marks=pytest.mark.slow),
        pytest.param("kill", "train-5", 0, (), marks=pytest.mark.slow),
        pytest.param("kill", "infer", 1, (), marks=pytest.mark.slow),
        pytest.param("freeze", "train-5", 1, (), marks=pytest.mark.slow),
        pytest.param("freeze", "infer", 0, (), marks=pytest.mark.slow),
        pytest.param("hang", "train-5", 0, ("--watch.stall_seconds", "4"), marks=pytest.mark.slow),
    ],
)
def test_a_lost_host_ends_the_job_and_the_next_run_finishes(launch, tmp_path, clean_digest, fault, step, victim, flags):
    words = ("--fault", fault, "--fault_step", step, "--victim", victim, *flags)
    job = launch(2, TOY, "--prefix", tmp_path, *words)
    assert job.exit_code != 0, job.text
    assert job.ended - first_fault(job) < LOSS_SECONDS, job.text
    # A killed or frozen leader cannot record anything. Its lease shows that the step was abandoned.
    leader_is_lost = victim == 0 and fault in ("kill", "freeze")
    assert status(tmp_path, step) == ("RUNNING" if leader_is_lost else "FAILED"), job.text
    if not leader_is_lost:
        failures = json.loads((output(tmp_path, step) / "error.json").read_text())["failures"]
        assert failures[0]["process_index"] == victim
    assert status(tmp_path, "train-2") == "SUCCESS"
    again = launch(2, TOY, "--prefix", tmp_path).require_success()
    assert re.search(r"train-2\s+REPLAY", again.text)
    assert digest(tmp_path) == clean_digest
    infer_succeeded = step == "train-5"
    assert re.search(rf"infer\s+{'SKIP' if infer_succeeded else 'RUN'}", again.text)
