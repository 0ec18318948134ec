"""`main`, and the experiment in the README, whose exact text is run."""

import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.executor.step import ExecutorStep
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.main import TrackerChoice, main
from simpo_pipeline.job.session import session_of
from steps.export import export
from steps.infer import infer
from steps.make_model import make_model
from steps.prepare_pairs import prepare_pairs
from steps.report import report
from steps.train import train

ROOT = pathlib.Path(__file__).resolve().parents[2]


def log_one_metric(config: dict, run: StepRun) -> None:
    session_of(run).tracker.log({"loss": 0.5}, step=1)


def run_one_step(prefix: pathlib.Path, **flags) -> list[pathlib.Path]:
    """Run a step that logs a metric, and return the trackers' files."""
    step = ExecutorStep("log", log_one_metric, {})
    main(JobFlags(prefix=str(prefix), **flags), steps=[step], tracker=TrackerChoice("jsonl", name="mine"))
    return sorted((prefix / "tracking").glob("*"))


def test_metrics_go_where_the_experiment_says_unless_the_flag_says_otherwise(tmp_path):
    (file,) = run_one_step(tmp_path / "experiment")
    assert file.name.startswith("mine-")
    assert json.loads(file.read_text().splitlines()[0])["metrics"] == {"loss": 0.5}
    assert run_one_step(tmp_path / "flag", tracker="none") == []


@pytest.fixture(scope="module")
def readme_experiment(tmp_path_factory) -> pathlib.Path:
    """Return a file with the experiment in the README."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (text,) = (block for block in blocks if "main(steps=" in block)
    assert len(text.splitlines()) <= 40
    path = tmp_path_factory.mktemp("readme") / "own_experiment.py"
    path.write_text(text)
    return path


def run_script(path: pathlib.Path, prefix: pathlib.Path, *flags: str) -> str:
    command = [sys.executable, str(path), "--prefix", str(prefix), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_experiment_of_the_readme_plans_five_steps(readme_experiment, tmp_path):
    text = run_script(readme_experiment, tmp_path / "prefix", "--dry_run")
    assert len(re.findall(r"^\S+ +RUN ", text, re.MULTILINE)) == 5, text


@pytest.mark.slow
def test_the_experiment_of_the_readme_runs(readme_experiment, tmp_path):
    text = run_script(readme_experiment, tmp_path)
    assert text.splitlines()[-1] == "Job finished with no error."
    (rows,) = tmp_path.glob("answers-*/all_hosts_merged_of_0001.jsonl")
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == [2, 2]
    (summary,) = tmp_path.glob("train-4-*/summary.json")
    assert json.loads(summary.read_text())["step"] == 4


def test_an_unknown_tracker_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="the tracker is 'mlflow'; expected one of wandb, jsonl, none"):
        TrackerChoice("mlflow")


def test_a_step_that_needs_a_job_says_how_to_run_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        executor_main(ExecutorMainConfig(prefix=str(tmp_path)), steps=[ExecutorStep("log", log_one_metric, {})])
    assert end.value.code == 1
    assert (
        "step 'log' needs a JobSession, but its session is NoneType. Replace executor_main" in capsys.readouterr().out
    )


@pytest.mark.parametrize("step", [export, infer, make_model, prepare_pairs, report, train])
def test_an_imported_step_has_the_name_and_the_parameters_of_its_body(step):
    assert step.__module__ == f"steps.{step.__qualname__}"
    body = getattr(importlib.import_module(f"steps.bodies.{step.__qualname__}"), step.__qualname__)
    assert list(inspect.signature(step).parameters) == list(inspect.signature(body).parameters)
