"""Effect of each flag of `executor_main`, on a script that interleaves training and generation."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.step import ExecutorStep, borrow, take, this_output_path, versioned
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

Main = Callable[..., tuple[int, str, str]]
DAG = ["train-2", "infer-128", "train-5", "report"]


def train(config: list[Any]) -> Live:
    write_text(join(config[0], "log.txt"), str(config[1]))
    return Live([config[1]], digest=str(config[1]))


def infer(config: list[Any]):
    write_text(join(config[0], "rows.txt"), "a row")


def interleave(stop: int = 7, report: Callable[[list[Any]], Any] = infer) -> list[ExecutorStep]:
    """train-2 ==> infer-128 (borrows) ==> train-5 (takes) -> report"""
    first = ExecutorStep("train-2", train, [this_output_path(), versioned(2)])
    middle = ExecutorStep("infer-128", infer, [this_output_path(), borrow(first)])
    last = ExecutorStep("train-5", train, [this_output_path(), versioned(stop), take(first)])
    return [ExecutorStep("report", report, [this_output_path(), last]), middle]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file below a folder, and None for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def no_number(text: str) -> NoReturn:
    raise AssertionError(f"{text} is no JSON")


def parsed(out: str) -> dict[str, Any]:
    """Return standard output parsed as exactly one JSON object."""
    document = json.loads(out, parse_constant=no_number)
    assert isinstance(document, dict)
    return document


def actions(out: str) -> dict[str, str]:
    return {row["step"]: row["action"] for row in parsed(out)["steps"]}


def test_only_json_goes_to_stdout_and_log_lines_go_to_stderr(main: Main):
    code, out, err = main(interleave(), "--dry_run", "--json")
    assert (code, err) == (0, "")
    assert parsed(out)["pending"] == 4
    assert sorted(actions(out)) == sorted(DAG)
    code, out, err = main(interleave(), "--json")
    assert (code, parsed(out)["error"]) == (0, None)
    assert actions(out) == dict.fromkeys(DAG, "RUN")
    assert re.search(r"^\d\d:\d\d:\d\d INFO train-5 succeeded", err, re.MULTILINE)
    code, out, err = main(interleave(), "--json", "--dry_run")
    assert (code, parsed(out)["pending"]) == (0, 0)
    code, out, err = main(interleave(), "--json", "--explain", "report")
    assert (code, [step["step_name"] for step in parsed(out)["steps"]]) == (0, ["report"])


def test_output_printed_by_a_step_is_kept_out_of_the_json(main: Main):
    code, out, err = main(interleave(report=lambda config: print("epoch 1")), "--json")
    assert (code, actions(out)) == (0, dict.fromkeys(DAG, "RUN"))
    assert "epoch 1" in err


def test_a_failed_run_reports_its_error_in_the_json(main: Main):
    def fail(config: list[Any]):
        raise FloatingPointError("the loss is NaN")

    code, out, err = main(interleave(report=fail), "--json")
    assert code == 1
    assert "FloatingPointError: the loss is NaN" in parsed(out)["error"]
    assert actions(out) == {**dict.fromkeys(DAG, "RUN"), "report": "FAILED"}
    assert "Traceback" in err


def test_values_that_json_cannot_represent_do_not_break_the_output(main: Main):
    def diverge(config: list[Any]):
        write_text(join(config[0], "summary.json"), '{"loss": NaN, "all": [Infinity, 1.5]}')

    code, out, _ = main(interleave(report=diverge), "--json")
    assert code == 0
    (summary,) = [row["summary"] for row in parsed(out)["steps"] if row["step"] == "report"]
    assert summary["all"][1] == 1.5


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_the_exit_code_of_a_dry_run_reports_whether_there_is_work(main: Main, flags: tuple[str, ...]):
    assert main(interleave(), "--dry_run", "--exit_code", *flags)[0] == 3
    assert main(interleave(), "--dry_run", *flags)[0] == 0
    assert main(interleave())[0] == 0
    assert main(interleave(), "--dry_run", "--exit_code", *flags)[0] == 0
    assert main(interleave(stop=8), "--dry_run", "--exit_code", *flags)[0] == 3
    assert main(interleave(stop=8), "--dry_run", "--exit_code", "--until", "infer-128", *flags)[0] == 0
    assert main(interleave(), "--dry_run", "--exit_code", "--force", "report", *flags)[0] == 3


def test_a_forced_step_runs_again_and_its_dependents_are_skipped_with_a_note(main: Main, tmp_path: Path):
    assert main(interleave())[0] == 0
    before = contents(tmp_path)
    expected = {**dict.fromkeys(DAG, "SKIP"), "train-5": "RUN", "train-2": "REPLAY"}
    code, out, _ = main(interleave(), "--force", "train-5", "--dry_run", "--json")
    reasons = {row["step"]: row["reason"] for row in parsed(out)["steps"]}
    assert (code, actions(out)) == (0, expected)
    assert "forced" in reasons["train-5"]
    assert "train-5" in reasons["report"] and "force it" in reasons["report"]
    assert contents(tmp_path) == before
    code, out, _ = main(interleave(), "--force", "train-5", "--json")
    assert (code, actions(out)) == (0, expected)
    changed = {name for name, data in contents(tmp_path).items() if data is not None and data != before.get(name)}
    assert {re.sub("-[^/]*", "", name) for name in changed if "train-5" not in name} == {"runs/experiments/experiment"}
    assert any("train-5" in name for name in changed)
    code, out, _ = main(interleave(), "--json")
    assert (code, actions(out)) == (0, dict.fromkeys(DAG, "SKIP"))


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (["infer-128"], ["train-2", "infer-128"]),
        (["train-5"], ["train-2", "infer-128", "train-5"]),
        (["train-2"], ["train-2"]),
        (["train-2", "report"], DAG),
    ],
)
def test_until_runs_a_step_its_dependencies_and_the_borrowers_a_taker_waits_for(
    main: Main, last: list[str], expected: list[str]
):
    code, out, _ = main(interleave(), "--json", "--until", *last)
    assert (code, actions(out)) == (0, dict.fromkeys(expected, "RUN"))
    code, out, _ = main(interleave(), "--json", "--dry_run")
    done = {step for step, action in actions(out).items() if action in ("SKIP", "REPLAY")}
    assert (code, done) == (0, set(expected))


def test_until_and_run_only_together_select_their_intersection(main: Main):
    _, out, _ = main(interleave(), "--json", "--until", "train-5", "--run_only", "infer|report")
    assert actions(out) == {"train-2": "RUN", "infer-128": "RUN"}


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_explain_prints_old_and_new_values_and_writes_nothing(main: Main, tmp_path: Path, flags: tuple[str, ...]):
    assert main(interleave())[0] == 0
    before = contents(tmp_path)
    code, out, err = main(interleave(stop=8), "--explain", "train-5", "infer-128", *flags)
    assert (code, err) == (0, "")
    assert re.search(r"^train-5  RUN: changed since train-5-[0-9a-f]{8}: \[1\]: 7 -> 8$", out, re.MULTILINE)
    assert re.search(r"^Changes since train-5-[0-9a-f]{8}:$", out, re.MULTILINE)
    assert re.search(r"^\[1\] +7 +8$", out, re.MULTILINE)
    assert re.search(r"^infer-128  SKIP: ", out, re.MULTILINE)
    assert "No other version of this step exists in the same folder." in out
    assert contents(tmp_path) == before


def test_explain_reports_a_step_that_is_not_selected(main: Main):
    code, out, _ = main(interleave(), "--explain", "report", "--until", "infer-128")
    assert code == 0
    assert "report  NONE: " in out


def test_a_relative_prefix_is_resolved_once_at_the_start(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def move(config: list[Any]):
        monkeypatch.chdir(Path(config[0]).anchor)

    code, out, _ = main(interleave(report=move), "--prefix", "some/../here", "--json")
    assert code == 0
    paths = [row["output_path"] for row in parsed(out)["steps"]]
    assert {str(Path(path).parent) for path in paths} == {str(tmp_path / "here")}
    assert all(Path(path, ".executor_status").read_text() == "SUCCESS" for path in paths)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_output_of_a_child_process_of_a_step_is_kept_out_of_the_json(tmp_path: Path):
    script = tmp_path / "experiment.py"
    script.write_text(
        "import subprocess\n"
        "from simpo_pipeline.executor import ExecutorStep, executor_main\n"
        "def work(config):\n"
        "    subprocess.run(['echo', 'from a child'], check=True)\n"
        "step = ExecutorStep('step', work, None)\n"
        "executor_main(steps=[step])\n"
    )
    command = [sys.executable, str(script), "--prefix", str(tmp_path / "runs"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["steps"][0]["action"] == "RUN"
    assert "from a child" in done.stderr


@pytest.mark.parametrize("flags", [("--run_only", "b", "--until", "a"), ("--until", "[]")])
def test_flags_that_leave_no_step_are_refused(main: Main, flags: tuple[str, ...]):
    steps = [ExecutorStep(name, lambda config: None, {"x": versioned(name)}) for name in ("a", "b")]
    code, out, err = main(steps, *flags)
    assert (code, out) == (2, "")
    assert "select no step" in err


def interrupt_when_begun(tmp_path: Path, script: str, *flags: str) -> Path:
    """Send Ctrl-C to a script once a step has written `begun`. Return its prefix, where every step must have ended."""
    file, runs = tmp_path / "experiment.py", tmp_path / "runs"
    file.write_text("import time\nfrom simpo_pipeline.executor import ExecutorStep, executor_main\n" + script)
    job = subprocess.Popen([sys.executable, str(file), "--prefix", str(runs), *flags], stderr=subprocess.PIPE)
    while not list(runs.glob("*/begun")):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    assert job.returncode != 0
    assert not list(runs.glob("*/.executor_status.lock"))
    return runs


@pytest.mark.parametrize("line", ["output.write_text('more', '')", "pass"], ids=["writes", "never-writes"])
def test_ctrl_c_stops_the_steps_in_the_pool_and_records_them_as_cancelled(tmp_path: Path, line: str):
    script = (
        "def work(config, output):\n"
        "    output.write_text('begun', '')\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        f"        {line}\n"
        "executor_main(steps=[ExecutorStep('endless', work, None)])\n"
    )
    runs = interrupt_when_begun(tmp_path, script, "--lease.heartbeat_seconds", "0.5")
    assert [path.read_text() for path in runs.glob("endless-*/.executor_status")] == ["CANCELLED"]


def test_ctrl_c_starts_no_further_step_of_the_pool(tmp_path: Path):
    script = (
        "def work(config, output):\n"
        "    output.write_text('begun', '')\n"
        "    for _ in range(200):\n"
        "        time.sleep(0.01)\n"
        "        output.check()\n"
        "executor_main(steps=[ExecutorStep(f'step-{i}', work, None) for i in range(100)])\n"
    )
    runs = interrupt_when_begun(tmp_path, script)
    assert {path.read_text() for path in runs.glob("*/.executor_status")} == {"CANCELLED"}
    assert len(list(runs.glob("*/begun"))) < 100
