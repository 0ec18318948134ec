"""Output and exit codes of `python -m simpo_pipeline.executor`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from simpo_pipeline.errors import StepFailedError, StorageError
from simpo_pipeline.executor.__main__ import main
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, this_output_path
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

KILLED_PROGRAM = """
import os, signal, sys
from simpo_pipeline.executor import Executor, ExecutorStep, this_output_path
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

def die(config):
    write_text(join(config[0], "half.txt"), "1234")
    os.kill(os.getpid(), signal.SIGKILL)

Executor(sys.argv[1]).run([ExecutorStep("killed", die, [this_output_path()])])
"""


@dataclass(frozen=True)
class Ran:
    """Result of a finished command."""

    code: int
    out: str
    err: str


def command(*words: str | Path) -> Ran:
    done = subprocess.run(
        [sys.executable, "-m", "simpo_pipeline.executor", *map(str, words)], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stdout + done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


def write_rows(config: list[str]):
    write_text(join(config[0], "rows.jsonl"), "x" * 1536)


def fail(config: list[str]):
    write_text(join(config[0], "part.txt"), "12")
    raise ValueError("no such row")


GOOD = ExecutorStep("documents/good", write_rows, [this_output_path()])
BAD = ExecutorStep("bad", fail, [this_output_path()])
AFTER = ExecutorStep("after", write_rows, [this_output_path(), output_path_of(BAD)])


def make_old(folder: Path) -> None:
    """Set the modification times of the files to two hours ago."""
    then = time.time() - 7200
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


@pytest.fixture
def busy_prefix(tmp_path: Path) -> Iterator[Path]:
    """Return a prefix with a step in each state. This process holds the running step, whose outputs are old."""
    prefix = tmp_path / "runs"
    killed = subprocess.Popen([sys.executable, "-c", KILLED_PROGRAM, str(prefix)], stderr=subprocess.DEVNULL)
    with pytest.raises(StepFailedError):
        Executor(str(prefix)).run([GOOD, AFTER])
    assert killed.wait(60) == -signal.SIGKILL
    runs, may_end = threading.Event(), threading.Event()

    def wait(config: list[str]):
        write_rows(config)
        runs.set()
        assert may_end.wait(60)

    running = ExecutorStep("running", wait, [this_output_path()])
    thread = threading.Thread(target=Executor(str(prefix)).run, args=([running],))
    thread.start()
    assert runs.wait(60)
    for path in prefix.glob("running-*/rows.jsonl"):
        os.utime(path, (0, 0))
    yield prefix
    may_end.set()
    thread.join()


def files_below(prefix: Path) -> set[str]:
    return {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}


def test_both_commands_on_a_prefix_with_a_step_in_each_state(busy_prefix):
    status = command("status", busy_prefix)
    assert (status.code, status.err) == (0, "")
    header, _, after, bad, good, killed, running = status.out.splitlines()
    host = socket.gethostname()
    assert header.split() == ["step", "status", "age", "holder", "files", "size"]
    assert (after.split()[0][:6], after.split()[1], after.split()[-3:]) == ("after-", "DEP_FAILED", ["0", "0", "B"])
    assert (bad.split()[0][:4], bad.split()[1], bad.split()[-3:]) == ("bad-", "FAILED", ["1", "2", "B"])
    assert (good.split()[0][:15], good.split()[1], good.split()[-3:]) == (
        "documents/good-",
        "SUCCESS",
        ["1", "1.5", "KiB"],
    )
    assert "RUNNING (abandoned)" in killed
    assert f"on host {host}, beat " in killed
    assert running.split()[1] == "RUNNING"
    assert f"pid {os.getpid()} on host {host}, beat " in running

    steps = json.loads(command("status", busy_prefix, "--json").out)["steps"]
    assert [step["status"] for step in steps] == ["DEP_FAILED", "FAILED", "SUCCESS", "RUNNING (abandoned)", "RUNNING"]
    assert [step["files"] for step in steps] == [0, 1, 1, 1, 1]
    assert [step["holder"] and step["holder"]["is_gone"] for step in steps] == [None, None, None, True, False]
    assert steps[4]["holder"]["pid"] == os.getpid()

    before = files_below(busy_prefix)
    listed = command("gc", busy_prefix)
    name = next(busy_prefix.glob("killed-*")).name
    assert (listed.code, listed.err) == (0, "")
    _, _, row, last = listed.out.splitlines()
    assert row.split() == ["attempt", name, "1", "4", "B"]
    assert last == "1 item, 4 B. Add --delete to remove them."
    assert files_below(busy_prefix) - before == set()

    removed = command("gc", busy_prefix, "--delete")
    assert (removed.code, removed.err) == (0, "")
    assert removed.out.splitlines()[-1] == "removed 1 item, 4 B."
    assert before - files_below(busy_prefix) == {f"{name}/half.txt", f"{name}/.executor_status.lock"}
    assert command("gc", busy_prefix).out == "Nothing to collect.\n"


def test_litter_two_hours_old_is_removed_and_the_next_run_is_unaffected(tmp_path):
    prefix = tmp_path / "runs"
    with pytest.raises(StepFailedError):
        Executor(str(prefix)).run([GOOD, AFTER])
    (prefix / ".shared-0a1b2c3d4e5f").write_text("probe")
    make_old(prefix)
    report = json.loads(command("gc", f"{prefix}/", "--json", "--delete").out)
    assert (report["prefix"], report["deleted"], report["bytes"], report["left"]) == (str(prefix), True, 7, [])
    assert [item["kind"] for item in report["items"]] == ["probe", "attempt"]
    again = Executor(str(prefix))
    with pytest.raises(StepFailedError):
        again.run([GOOD, AFTER])
    assert [result.action for result in again.results] == ["SKIP", "FAILED", "DEP_FAILED"]


def test_bad_usage_and_an_invalid_prefix_give_one_sentence_and_exit_code_two(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no prefix")
    cases = [
        ((), "required: COMMAND"),
        (("statsu", "runs"), "invalid choice: 'statsu'"),
        (("status",), "required: PREFIX"),
        (("status", "runs", "--delete"), "unrecognized arguments: --delete"),
        (("status", str(tmp_path / "missing")), "does not exist"),
        (("gc", str(tmp_path / "empty")), "is a file or an empty folder"),
        (("gc", str(tmp_path / "file"), "--delete"), "is a file or an empty folder"),
        (("status", "gs:/bucket"), "URL that lost a slash"),
        (("status", "nosuch://bucket"), "Cannot reach 'nosuch://bucket'"),
    ]
    for words, message in cases:
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)
        assert message in err
    done = command("status", tmp_path / "missing")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: '{tmp_path}/missing' does not exist. Pass the folder or URL that an experiment used as its --prefix.\n"
    )


def test_a_storage_failure_during_removal_gives_exit_code_one(tmp_path, monkeypatch, capsys):
    with pytest.raises(StepFailedError):
        Executor(str(tmp_path)).run([BAD])
    make_old(tmp_path)

    def broken(self: ConditionalFiles, path: str, expected: str) -> bool:
        raise StorageError(f"Cannot remove {path!r}: the disk is read-only.")

    monkeypatch.setattr(ConditionalFiles, "remove", broken)
    assert main(["gc", str(tmp_path), "--delete"]) == 1
    out, err = capsys.readouterr()
    assert out == "removed 0 items, 0 B.\n"
    assert err.splitlines()[-1].startswith("error: Cannot remove")


def test_the_executor_package_does_not_import_the_commands():
    code = "import sys, simpo_pipeline.executor; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {f"simpo_pipeline.executor.{name}" for name in ("commands.survey", "commands.litter", "__main__")} & set(
        out.split()
    )


def test_the_commands_import_nothing_slow():
    code = "import sys, simpo_pipeline.executor.__main__; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"jax", "numpy", "draccus", "gcsfs", "transformers", "wandb"} & set(out.split())
