"""The local launcher: lines with their host, the exit code of the job, and no process left behind."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

LAUNCHER = str(pathlib.Path(__file__).resolve().parents[2] / "infra" / "launch.py")


def command(count: int, code: str) -> list[str]:
    return [
        sys.executable,
        LAUNCHER,
        "--local",
        str(count),
        "--devices_per_host",
        "3",
        "--",
        sys.executable,
        "-c",
        code,
    ]


def run(count: int, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(count, code), capture_output=True, text=True, timeout=60)


def is_running(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_process_joins_one_job_and_its_lines_have_a_prefix():
    names = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_COORDINATOR_ADDRESS", "JAX_PLATFORMS")
    done = run(3, f"import os; print('place', *(os.environ[name] for name in {names}))")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "Job finished with no error."
    places = sorted(line.split() for line in lines[:-1])
    assert [place[:5] for place in places] == [[f"[{i}]", "place", str(i), "3", "3"] for i in range(3)]
    assert len({place[5] for place in places}) == 1
    assert {place[6] for place in places} == {"cpu"}


def test_given_variables_reach_every_process():
    line = [sys.executable, LAUNCHER, "--local", "2", "-e", "MINE=--as it=is", "-e", "OTHER", "it's", "--"]
    code = "import os; print(os.environ['MINE'], os.environ['OTHER'])"
    done = subprocess.run([*line, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert sorted(done.stdout.splitlines()[:2]) == ["[0] --as it=is it's", "[1] --as it=is it's"], done.stderr


def test_a_dry_run_starts_nothing_and_prints_what_it_would_start():
    line = [sys.executable, LAUNCHER, "--dry_run", "--local", "2", "-e", "MINE", "it's", "--", sys.executable]
    done = subprocess.run([*line, "-c", "print('ran')"], capture_output=True, text=True, timeout=60)
    *commands, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "# Dry run: nothing was started. PORT stands for a free port."
    for index, words in enumerate(map(shlex.split, commands)):
        assert words[-3:] == [sys.executable, "-c", "print('ran')"]
        assert {f"JAX_PROCESS_ID={index}", "JAX_NUM_PROCESSES=2", "MINE=it's"} < set(words)
    assert len(commands) == 2


def test_the_exit_code_is_that_of_the_first_process_to_fail_and_its_last_lines_are_printed():
    code = (
        "import os, sys, time; i = int(os.environ['JAX_PROCESS_ID']); print('I am', i); time.sleep(i); sys.exit(i * 5)"
    )
    done = run(3, code)
    assert done.returncode == 5
    assert "Job failed: host 1 of 3 exited with code 5; no other host failed before it. Its last lines:" in done.stderr
    assert "    I am 1" in done.stderr
    assert "Job finished" not in done.stdout


def test_a_process_killed_by_a_signal_counts_as_failed():
    done = run(2, "import os, signal; os.environ['JAX_PROCESS_ID'] == '1' and os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 137


SIGNALS = [
    [signal.SIGINT, signal.SIGINT],  # a second Ctrl-C skips the wait
    pytest.param([signal.SIGINT], marks=pytest.mark.slow),
    pytest.param([signal.SIGTERM], marks=pytest.mark.slow),
    pytest.param([signal.SIGHUP], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("signals", SIGNALS)
def test_an_interrupted_job_leaves_no_process_behind_even_if_frozen_or_ignoring_signals(signals):
    code = (
        "import os, signal, time, subprocess, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('pids', os.getpid(), child.pid, flush=True)\n"
        "os.environ['JAX_PROCESS_ID'] == '1' and os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(600)\n"
    )
    job = subprocess.Popen(command(2, code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout is not None
    pids = [int(pid) for _ in range(2) for pid in job.stdout.readline().split()[2:]]
    assert len(pids) == 4 and all(map(is_running, pids))
    for number in signals:
        os.kill(job.pid, number)
        time.sleep(0.5)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 130
    assert errors.splitlines()[-1] == "Job interrupted."
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--local", "2"], "the command is missing; write it after --"),
        (["--local", "0", "--", "true"], "'0' is not a positive integer"),
        (["--local", "2", "--devices_per_host", "x", "--", "true"], "'x' is not a positive integer"),
        (["--local", "2", "--", "no-such-program-here"], "program 'no-such-program-here' was not found"),
        (["--", "true"], "--local"),
    ],
)
def test_invalid_arguments_are_reported_and_nothing_is_started(words, message):
    done = subprocess.run([sys.executable, LAUNCHER, *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert message in done.stderr
