"""Output and exit code of a script that calls `executor_main`."""

import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.run import Live, StepRun
from simpo_pipeline.executor.step import ExecutorStep, borrow, take, this_output_path, versioned
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.files import write_json
from simpo_pipeline.storage.paths import join

SCRIPT = """
import os, sys, time
from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.main import executor_main
from simpo_pipeline.executor.step import ExecutorStep, borrow, take, this_output_path, versioned
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

def train(config, run):
    state = config[1] or {"step": 0}
    if config[1] is not None and "HANG" in os.environ:
        write_text(os.environ["HANG"], "the taker runs")
        time.sleep(600)
    state["step"] = config[2]
    write_text(join(config[0], "log.txt"), str(state))
    return Live(state, digest=str(state))

def infer(config):
    write_text(join(config[0], "rows.txt"), f"rows of step {config[1]['step']}")

first = ExecutorStep("train-2", train, [this_output_path(), None, versioned(2)])
middle = ExecutorStep("infer-128", infer, [this_output_path(), borrow(first)])
last = ExecutorStep("train-5", train, [this_output_path(), take(first), versioned(7)])

if __name__ == "__main__":
    executor_main(steps=[first, middle, last], description="a toy")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, **environment}
    env.pop("MARIN_PREFIX", None)
    env |= environment
    return subprocess.Popen(
        [sys.executable, str(script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=script.parent,
    )


def run(script: Path, *flags: str, **environment: str) -> tuple[int, str, str]:
    process = start(script, *flags, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def rows_of_last_table(out: str) -> dict[str, str]:
    """Return the action of each step in the last table of the output."""
    lines = out.splitlines()
    rule = max(number for number, line in enumerate(lines) if line.startswith("---"))
    return {line.split()[0]: line.split()[1] for line in lines[rule + 1 :] if not line.startswith("Job ")}


def test_a_script_runs_its_steps_and_reports_success_at_the_end(script):
    code, out, err = run(script, "--prefix", "runs")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "Job finished with no error."
    assert rows_of_last_table(out) == {"train-2": "RUN", "infer-128": "RUN", "train-5": "RUN"}
    assert len(list(script.parent.glob("runs/experiments/experiment-*.json"))) == 1


def test_the_prefix_comes_from_the_flag_then_marin_prefix_then_the_default(script):
    run(script, "--prefix", "flag", MARIN_PREFIX=str(script.parent / "environment"))
    run(script, MARIN_PREFIX=str(script.parent / "environment"))
    run(script)
    assert sorted(path.name for path in script.parent.iterdir() if path.is_dir()) == ["environment", "flag", "runs"]


def test_a_dry_run_prints_the_plan_and_makes_nothing(script):
    code, out, err = run(script, "--prefix", "runs", "--dry_run")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["step", "action", "reason", "version", "output", "path"]
    assert rows_of_last_table(out) == {"train-2": "RUN", "infer-128": "RUN", "train-5": "RUN"}
    assert list(script.parent.iterdir()) == [script]


def test_after_a_kill_in_the_taker_the_producer_is_replayed_and_the_borrower_skipped(script):
    hanging = start(script, "--prefix", "runs", HANG=str(script.parent / "hangs"))
    while not (script.parent / "hangs").exists():
        assert hanging.poll() is None
        time.sleep(0.02)
    hanging.send_signal(signal.SIGKILL)
    hanging.communicate()
    _, planned, _ = run(script, "--prefix", "runs", "--dry_run")
    code, out, _ = run(script, "--prefix", "runs")
    assert code == 0
    assert f"left RUNNING by pid {hanging.pid} on host" in planned
    assert "which is gone" in planned
    expected = {"train-2": "REPLAY", "infer-128": "SKIP", "train-5": "RUN"}
    assert rows_of_last_table(planned) == expected
    assert rows_of_last_table(out) == expected
    assert [path.read_text() for path in script.parent.glob("runs/train-5-*/log.txt")] == ["{'step': 7}"]
    assert [path.read_text() for path in script.parent.glob("runs/train-2-*/log.txt")] == ["{'step': 2}"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dry_rnu",), "Unknown flag --dry_rnu. Did you mean --dry_run?"),
        (("--max_concurrent", "0"), "max_concurrent is 0"),
        (("--run_only", "nothing"), "matches no step"),
        (("--prefix", "gs:/bucket"), "URL that lost a slash"),
        (("--lease.heartbeat_seconds", "500"), "heartbeat"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_two(script, flags, message):
    code, out, err = run(script, *flags)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in out + err
    assert list(script.parent.iterdir()) == [script]


def test_a_prefix_that_cannot_be_read_is_one_sentence_and_exit_code_two(script):
    (script.parent / "file").write_text("in the way")
    for flags in ([], ["--dry_run"]):
        code, out, err = run(script, "--prefix", "file/runs", *flags)
        assert code == 2
        assert "file/runs" in err
        assert "Traceback" not in out + err


def test_planning_imports_neither_jax_nor_slow_packages():
    program = "import sys, simpo_pipeline.executor.main; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    tops = {name.split(".")[0] for name in out.split()}
    assert not tops & {
        "jax",
        "jaxlib",
        "haliax",
        "equinox",
        "optax",
        "transformers",
        "wandb",
        "draccus",
        "gcsfs",
        "numpy",
    }


@dataclass(frozen=True)
class Config(ExecutorMainConfig):
    """Config of an experiment with an additional flag."""

    preset: str = "tiny"


class Session:
    """Session that the steps of an experiment share, closed at the end."""

    def __init__(self):
        self.closed: list[BaseException | None] = []
        self.seen = 0

    def close(self, error: BaseException | None):
        self.closed.append(error)


def summarise(config: list[str], run: StepRun):
    run.session.seen += 1
    write_json(join(config[0], "summary.json"), {"loss": 0.6931, "tokens": 1234567, "tokens_per_second": 98.76})


SUMMARISED = ExecutorStep("train", summarise, [this_output_path()])


def test_the_final_table_shows_values_from_step_summaries(prefix, capsys):
    session = Session()
    executor_main(Config(prefix=prefix), steps=[SUMMARISED], session=session)
    header, _, row, last = capsys.readouterr().out.splitlines()[-4:]
    assert header.split() == ["step", "action", "seconds", "tokens", "tok/s", "loss", "output", "path"]
    assert row.split()[3:6] == ["1,234,567", "98.76", "0.6931"]
    assert last == "Job finished with no error."
    assert (session.seen, session.closed) == (1, [None])


def test_other_columns_may_be_shown(prefix, capsys):
    executor_main(Config(prefix=prefix), steps=[SUMMARISED], session=Session(), summary_columns=[("cost", "loss")])
    assert capsys.readouterr().out.splitlines()[-4].split() == ["step", "action", "seconds", "cost", "output", "path"]


def test_a_damaged_summary_affects_only_its_cells(prefix, capsys):
    broken = replace(SUMMARISED, fn=lambda config: write_json(join(config[0], "summary.json"), [1]))
    executor_main(Config(prefix=prefix), steps=[broken])
    assert capsys.readouterr().out.splitlines()[-1] == "Job finished with no error."


def test_a_log_line_is_shown_once_although_a_library_adds_a_root_handler(prefix, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def log_after_import(config: Any):
        logging.basicConfig(stream=sys.stdout)
        logging.getLogger("simpo_pipeline.steps").info("a word of the step")

    executor_main(Config(prefix=prefix), steps=[replace(SUMMARISED, fn=log_after_import)])
    assert capsys.readouterr().out.count("a word of the step") == 1


def test_a_failing_step_gives_exit_code_one_and_a_traceback_and_the_session_gets_the_error(prefix, capsys):
    def fail(config: Any):
        raise FloatingPointError("the loss is NaN")

    session = Session()
    with pytest.raises(SystemExit) as caught:
        executor_main(Config(prefix=prefix), steps=[replace(SUMMARISED, fn=fail)], session=session)
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "FloatingPointError: the loss is NaN" in out
    assert "in fail" in out
    assert "Job finished with no error." not in out
    assert [type(error).__name__ for error in session.closed] == ["StepFailedError"]


def test_an_invalid_dag_gives_exit_code_two(prefix, capsys):
    made = ExecutorStep("made", lambda config: Live(1), versioned(1))
    takers = [ExecutorStep(name, lambda config: None, [take(made)]) for name in ("one", "two")]
    with pytest.raises(SystemExit) as caught:
        executor_main(Config(prefix=prefix), steps=[*takers, ExecutorStep("three", None, [borrow(made)])])
    assert caught.value.code == 2
    assert "'one' and 'two' both take" in capsys.readouterr().err


def test_a_dry_run_leaves_the_session_alone(prefix, capsys):
    session = Session()
    executor_main(Config(prefix=prefix, dry_run=True), steps=[SUMMARISED], session=session)
    assert (session.seen, session.closed) == (0, [])
    assert "train" in capsys.readouterr().out


def test_only_the_leader_prints_tables(prefix, capsys):
    follower = Processes(1, 2, agree=lambda value: {"value": [[0, "RUN", "never ran"]], "error": None})
    executor_main(Config(prefix=prefix, dry_run=True), steps=[SUMMARISED], processes=follower)
    assert capsys.readouterr().out == ""
