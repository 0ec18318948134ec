"""Bad input is reported in one paragraph that says what to do, and earlier outputs are kept."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.step import ExecutorStep, borrow, take, this_output_path, versioned
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

Main = Callable[..., tuple[int, str, str]]


def train(config: list[Any]) -> Live:
    write_text(join(config[0], "log.txt"), str(config[1]))
    return Live([config[1]], digest=str(config[1]))


def infer(config: list[Any]):
    write_text(join(config[0], "rows.txt"), "a row")


def interleave() -> dict[str, ExecutorStep]:
    """train-2 ==> infer-128 (borrows) ==> train-5 (takes)"""
    first = ExecutorStep("train-2", train, [this_output_path(), versioned(2)])
    middle = ExecutorStep("infer-128", infer, [this_output_path(), borrow(first)])
    last = ExecutorStep("train-5", train, [this_output_path(), versioned(7), take(first)])
    return {step.name: step for step in (first, middle, last)}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file below a folder, and None for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refused(result: tuple[int, str, str], *words: str) -> None:
    """Assert exit code 2 and one paragraph on standard error that contains all the words."""
    code, out, err = result
    assert code == 2
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert "\n\n" not in err
    assert err.count("error: ") == 1
    assert "Traceback" not in out + err
    for word in words:
        assert word in err


BAD_FLAGS: list[tuple[list[str], list[str]]] = [
    (["--dry_rnu"], ["--dry_rnu", "Did you mean --dry_run?"]),
    (["--frobnicate", "3"], ["--frobnicate", "Run with --help"]),
    (["--lease.heartbeat", "3"], ["Did you mean --lease.heartbeat_seconds?"]),
    (["train-2"], ["train-2", "Run with --help"]),
    (["--run_only", "generate"], ["run_only", "'generate'", "matches no step", "train-2, infer-128, train-5"]),
    (["--run_only", "train", "inf(er"], ["run_only", "'inf(er'", "not a valid regular expression"]),
    (["--until", "train-22"], ["--until", "'train-22'", "Did you mean 'train-2'?"]),
    (["--force", "infer"], ["--force", "'infer'", "Did you mean 'infer-128'?"]),
    (["--explain", "infer-129"], ["--explain", "'infer-129'", "Did you mean 'infer-128'?"]),
    (["--until", "zzz"], ["--until", "'zzz'", "The steps are: train-2, infer-128, train-5"]),
    (["--until"], ["--until"]),
    (["--exit_code"], ["--exit_code", "--dry_run"]),
    (["--max_concurrent", "many"], ["max_concurrent", "'many'"]),
    (["--max_concurrent", "-1"], ["max_concurrent", "-1", "at least 1"]),
    (["--dry_run", "perhaps"], ["dry_run", "'perhaps'"]),
    (["--lease.expiry_seconds", "nan"], ["lease.expiry_seconds", "nan"]),
    (["--prefix", "gs:/bucket/x"], ["'gs:/bucket/x'", "'gs://bucket/x'"]),
    (["--executor_info_base_path", "gs:/bucket/x"], ["'gs:/bucket/x'", "'gs://bucket/x'"]),
    (["--prefix", "ftp://host/x"], ["ftp://", "no conditional writes", "--unsafe_locks"]),
    (["--prefix", "nowhere://host/x"], ["nowhere"]),
    (["--prefix", "file/runs"], ["file/runs"]),
    (["--prefix", "file/runs", "--dry_run"], ["file/runs"]),
    (["--executor_info_base_path", "file/records", "--prefix", "new"], ["file/records"]),
    (["--config_path", "nothing.yaml"], ["nothing.yaml"]),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_a_bad_flag_is_refused_and_earlier_outputs_are_unchanged(
    main: Main, tmp_path: Path, flags: list[str], words: list[str]
):
    (tmp_path / "file").write_text("in the way")
    assert main([*interleave().values()])[0] == 0
    before = contents(tmp_path / "runs")
    check_refused(main([*interleave().values()], *flags), *words)
    assert contents(tmp_path / "runs") == before


@pytest.mark.parametrize("prefix", ["gs://", "gs:///x", "gcs://"])
def test_a_url_without_a_bucket_is_refused(prefix: str):
    with pytest.raises(ConfigError, match="bucket"):
        Executor(prefix)


def two_takers(steps: dict[str, ExecutorStep]):
    steps["second"] = ExecutorStep("second", train, [this_output_path(), 9, take(steps["train-2"])])


def borrow_after_take(steps: dict[str, ExecutorStep]):
    steps["late"] = ExecutorStep("late", infer, [this_output_path(), borrow(steps["train-2"]), steps["train-5"]])


def borrow_what_is_taken(steps: dict[str, ExecutorStep]):
    steps["both"] = ExecutorStep("both", infer, [borrow(steps["train-5"]), take(steps["train-5"])])


def cycle(steps: dict[str, ExecutorStep]):
    object.__setattr__(steps["train-2"], "config", [this_output_path(), steps["train-5"] / "log.txt"])


def nested_output_paths(steps: dict[str, ExecutorStep]):
    steps["other"] = ExecutorStep("other", infer, [this_output_path()]).with_output_path("elsewhere")
    steps["third"] = ExecutorStep("third", infer, [this_output_path()]).with_output_path("elsewhere/below")


def with_value(value: Any) -> Callable[[dict[str, ExecutorStep]], None]:
    """Return a function that adds a step with a versioned value."""

    def add(steps: dict[str, ExecutorStep]):
        steps["odd"] = ExecutorStep("odd", infer, {"deep": [versioned({"value": value})]})

    return add


def endless() -> list[Any]:
    """Return a list that contains itself."""
    value: list[Any] = []
    value.append(value)
    return value


BAD_DAGS: dict[str, tuple[Callable[[dict[str, ExecutorStep]], None], list[str]]] = {
    "two takers": (two_takers, ["'train-5' and 'second' both take", "'train-2'", "borrow it"]),
    "borrow after take": (
        borrow_after_take,
        ["in a cycle", "late", "train-5", "Make the borrowers independent of the taker"],
    ),
    "borrow what is taken": (borrow_what_is_taken, ["'both'", "'train-5'", "Taking it is enough"]),
    "cycle": (cycle, ["in a cycle", "train-2", "train-5", "Remove one of these dependencies"]),
    "nested output paths": (
        nested_output_paths,
        ["elsewhere/below", "'third'", "'other'", "different name or output path"],
    ),
    "lambda": (with_value(lambda: 0), ["deep[0].value", "<lambda>", "Pass a name"]),
    "address": (with_value(object()), ["deep[0].value", "object at 0x", "Pass a name"]),
    "keys that are no text": (with_value({1: "one"}), ["deep[0].value", "keys must be str", "Convert the keys to str"]),
    "step in a value": (with_value([ExecutorStep("x", None, None)]), ["deep[0].value", "must not contain steps"]),
    "number too long for JSON": (with_value(10**5000), ["odd"]),
    "half a character": (with_value("\ud800"), ["odd"]),
    "list in itself": (with_value(endless()), ["deep[0]"]),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_DAGS.values(), ids=BAD_DAGS)
def test_a_bad_dag_is_refused_and_earlier_outputs_are_unchanged(
    main: Main, tmp_path: Path, spoil: Callable[[dict[str, ExecutorStep]], None], words: list[str]
):
    assert main([*interleave().values()])[0] == 0
    before = contents(tmp_path)
    steps = interleave()
    spoil(steps)
    for flags in ([], ["--dry_run"]):
        check_refused(main([*steps.values()], *flags), *words)
    assert contents(tmp_path) == before


NO_PERMISSION = """
import os, sys
from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.step import ExecutorStep, this_output_path
from simpo_pipeline.storage.files import exists

exists(sys.argv[1])  # imports what reaches the file system
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
step = ExecutorStep("step", lambda config: print("it ran"), [this_output_path()])
executor_main(ExecutorMainConfig(prefix=sys.argv[1], dry_run=True), steps=[step])
executor_main(ExecutorMainConfig(prefix=sys.argv[1]), steps=[step])
"""


def test_a_read_only_prefix_can_be_planned_and_a_run_there_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "runs")
        prefix.mkdir()
        (prefix / "kept").write_text("kept")
        prefix.chmod(0o555)
        os.chmod(folder, 0o755)
        done = subprocess.run(
            [sys.executable, "-c", NO_PERMISSION, prefix], capture_output=True, text=True, timeout=60, cwd=folder
        )
        assert contents(prefix) == {"kept": b"kept"}
        prefix.chmod(0o755)
    assert "never ran" in done.stdout
    assert "it ran" not in done.stdout
    check_refused((done.returncode, done.stdout, done.stderr), "Permission denied", str(prefix), "permissions")


FULL_DISK = """
import contextlib, io, json, resource, signal, subprocess, sys
from pathlib import Path
from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.step import ExecutorStep, this_output_path
from simpo_pipeline.storage.files import write_bytes
from simpo_pipeline.storage.paths import join

kind, folder, size = sys.argv[1], Path(sys.argv[2]), 1 << 18

def limit(largest_file):
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def fill():
    if kind == "limit":
        return limit(0)
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

def free():
    limit(resource.RLIM_INFINITY) if kind == "limit" else (folder / "filler").unlink()

def make(config):
    if config[2]:
        fill()
    write_bytes(join(config[0], "rows"), bytes(config[1]))

def run(num_bytes, fills):
    small = ExecutorStep("small", make, [this_output_path(), 9, False])
    hungry = ExecutorStep("hungry", make, [this_output_path(), num_bytes, fills, small])
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            executor_main(ExecutorMainConfig(prefix=str(folder / "runs"), json=True), steps=[hungry])
        except SystemExit as ended:
            code = ended.code
    names = (".executor_status", "manifest.json", "error.json", "rows")
    files = {path.parent.name.split("-")[0] + "/" + path.name: path.read_bytes().hex()
             for name in names for path in folder.glob(f"runs/*-*/{name}")}
    return {"code": code, "error": json.loads(out.getvalue())["error"], "files": files}

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if kind == "limit":
    limit(size)
else:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
results = [run(size + 1, False), run(9, True)]
free()
print(json.dumps([*results, run(9, False)]))
"""


def may_mount(folder: Path) -> bool:
    """Return whether this machine allows mounting a small disk in a new namespace."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", folder]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk_fails_the_step_that_filled_it_and_the_next_run_with_space_finishes(tmp_path: Path, kind: str):
    if kind == "tmpfs" and not may_mount(tmp_path):
        pytest.skip("no namespaces for us on this machine")
    namespace = ["unshare", "-rm"] if kind == "tmpfs" else []
    done = subprocess.run(
        [*namespace, sys.executable, "-c", FULL_DISK, kind, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    too_big, full, freed = json.loads(done.stdout)
    for result in (too_big, full):
        assert result["code"] == 1
        assert "Step 'hungry' failed" in result["error"]
        assert "/rows" in result["error"]
        assert "hungry/manifest.json" not in result["files"]
    small = {name: data for name, data in too_big["files"].items() if name.startswith("small/")}
    assert bytes.fromhex(small["small/.executor_status"]) == b"SUCCESS"
    assert bytes.fromhex(too_big["files"]["hungry/.executor_status"]) == b"FAILED"
    assert "hungry/error.json" in too_big["files"]
    assert bytes.fromhex(full["files"]["hungry/.executor_status"]) == b"RUNNING"
    assert small.items() <= full["files"].items()
    assert small.items() <= freed["files"].items()
    assert (freed["code"], freed["error"]) == (0, None)
    assert bytes.fromhex(freed["files"]["hungry/.executor_status"]) == b"SUCCESS"
    assert freed["files"]["hungry/rows"] == bytes(9).hex()


def test_a_record_that_cannot_be_written_does_not_hide_which_step_failed(main: Main, tmp_path: Path):
    def fail(config: Any):
        path = next(tmp_path.glob("runs/broken-*"))
        path.with_name(path.name.replace("broken", "x")).touch()
        raise RuntimeError("the cause")

    broken = ExecutorStep("broken", fail, [this_output_path()], override_output_path="broken-0")
    user = ExecutorStep("user", infer, [this_output_path(), broken], override_output_path="x-0")
    code, out, err = main([broken, user], "--json")
    assert code == 1
    assert "the cause" in err
    assert "Step 'broken' failed" in json.loads(out)["error"]


@pytest.mark.parametrize("info", [b"[]", b"{", b"", b"\xff", b"[" * 100_000, None])
def test_a_replay_without_a_readable_record_to_compare_with_says_what_to_do(
    main: Main, tmp_path: Path, info: bytes | None
):
    assert main([*interleave().values()], "--until", "infer-128")[0] == 0
    (path,) = tmp_path.glob("runs/train-2-*/.executor_info")
    path.unlink() if info is None else path.write_bytes(info)
    before = contents(tmp_path)
    code, out, err = main([*interleave().values()], "--json")
    assert (code, err.count("error: ")) == (1, 0)
    assert str(path) in json.loads(out)["error"]
    assert "Remove" in json.loads(out)["error"]
    kept = {name: data for name, data in before.items() if "experiments" not in name}
    assert kept.items() <= contents(tmp_path).items()


@pytest.mark.parametrize("status", [b"", b"SUCCES", b"\xff\x00", b"SUCCESS" * 20, b"[" * 1000])
def test_a_corrupt_status_is_shown_in_the_plan_and_the_step_runs_again(main: Main, tmp_path: Path, status: bytes):
    assert main([*interleave().values()])[0] == 0
    before = contents(tmp_path)
    (path,) = tmp_path.glob("runs/infer-128-*/.executor_status")
    path.write_bytes(status)
    code, out, err = main([*interleave().values()], "--dry_run")
    assert (code, err) == (0, "")
    assert "which is not a valid status" in out
    assert main([*interleave().values()])[0] == 0
    kept = {name: data for name, data in before.items() if "experiments" not in name and not name.endswith("_info")}
    assert kept.items() <= contents(tmp_path).items()
