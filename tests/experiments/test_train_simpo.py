"""`experiments/train_simpo.py` as users call it: a settings file yields a DAG or one clear error."""

import json
import pathlib
import runpy
import subprocess
import sys
from collections.abc import Sequence

import pytest

from experiments.settings.command_line import setting_names
from experiments.settings.sample_lm_multihost import SampleLmMultihostConfig
from experiments.settings.train_simpo import TrainSimpoConfig

ROOT = pathlib.Path(__file__).parents[2]
M11 = "experiments/configs/simpo_ultrafeedback_llama3_8b_v5p_32_m11_train2_infer128_train5.yaml"
TINY = "experiments/configs/simpo_tiny_train2_infer8_train5.yaml"


def run(*words: str, timeout: int = 60, python: Sequence[str] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    command = [*python, "experiments/train_simpo.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def planned_steps(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    header, _, *rows = done.stdout.splitlines()
    assert header.split() == ["step", "action", "reason", "version", "output", "path"]
    assert all(row.split()[1] == "RUN" for row in rows)
    return [row.split()[0] for row in rows]


def test_the_dry_run_of_m11_prints_train_2_infer_128_train_5_and_touches_nothing(tmp_path):
    done = run("--config_path", M11, "--prefix", str(tmp_path / "runs"), "--dry_run")
    assert planned_steps(done) == ["fetch_model", "prepare_pairs", "train-2", "infer-128", "train-5", "report"]
    assert list(tmp_path.iterdir()) == []


def test_planning_a_run_imports_nothing_heavy(tmp_path):
    heavy = ("jax", "equinox", "haliax", "optax", "transformers", "wandb")
    code = (
        "import runpy, sys; runpy.run_path('experiments/train_simpo.py', run_name='__main__');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "--config_path", M11, "--prefix", str(tmp_path), "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_setting_on_the_command_line_changes_the_dag(tmp_path):
    words = ["--config_path", M11, "--prefix", str(tmp_path), "--dry_run=true", "--inference_eval.eval_at_steps"]
    steps = planned_steps(run(*words, "[3, 5]", "--inference_eval.synthetic_prompt_count=16"))
    kinds = [step.partition("-")[0] for step in steps]
    assert kinds == ["fetch_model", "prepare_pairs", "train", "infer", "train", "infer", "train", "report"]
    assert steps[2].startswith("train-3") and steps[3].startswith("infer-16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config_path is missing"),
        (["--config_path", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["--config_path", M11, "--trainer.num_train_stepz", "3"],
            "command line: trainer.num_train_stepz is not a setting; the nearest is trainer.num_train_steps; see ",
        ),
        (
            ["--config_path", M11, "--inference_eval.reset_mode", "physical"],
            "command line: inference_eval.reset_mode is not a setting; ",
        ),
        (
            ["--config_path", M11, "--trainer.num_train_steps", "1"],
            f"{M11} with the command line: inference_eval.eval_at_steps has 2, but the run has only 1 updates",
        ),
        (["--config_path", M11, "--dry_runn"], "command line: dry_runn is not a setting"),
        (["--config_path", M11, "--tracker", "tensorboard"], "tracker"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error_and_exit_code_2(words, message, tmp_path):
    done = run(*words, "--dry_run", "--prefix", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_help_names_the_flags():
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("--config_path", "inference_eval", "--prefix", "--tracker"))


def test_checkpoints_and_an_export_are_flags_and_leave_the_other_steps_unchanged(tmp_path):
    words = ["--config_path", TINY, "--prefix", str(tmp_path), "--dry_run"]
    keeping = ["--export", "bf16", "--export_weights", "ema", "--checkpoint.when", "every", "--checkpoint.every", "2"]
    plain, kept = run(*words, "--trainer.ema_decay", "0.9"), run(*words, "--trainer.ema_decay", "0.9", *keeping)
    plain_steps, kept_steps = planned_steps(plain), planned_steps(kept)
    assert kept_steps == [*plain_steps[:-1], "export", "report"]
    assert [row for row in kept.stdout.splitlines() if not row.startswith("export")] == plain.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--export", "fp16"], "error: --export 'fp16' is unknown; choose one of fp32, bf16"),
        (["--export_weights", "ema"], "error: --export_weights is 'ema', but nothing is exported; add --export"),
        (
            ["--export", "fp32", "--export_weights", "ema"],
            "error: --export_weights is 'ema', but this run keeps no moving average: set trainer.ema_decay",
        ),
    ],
)
def test_an_impossible_export_is_refused(words, message, tmp_path):
    done = run("--config_path", TINY, "--prefix", str(tmp_path), "--dry_run", *words)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [message]


@pytest.mark.parametrize("settings", [TrainSimpoConfig, SampleLmMultihostConfig])
def test_no_setting_has_the_name_of_a_flag(settings):
    flags = runpy.run_path(str(ROOT / "experiments/train_simpo.py"))["TrainFlags"]
    assert not {*setting_names(settings)} & {*setting_names(flags), "config_path", "help"}


@pytest.mark.slow
def test_the_tiny_file_trains_generates_and_resumes_training(python, tmp_path):
    words = ["--config_path", TINY, "--prefix", str(tmp_path), "--tracker", "none"]
    done = run(*words, timeout=200, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Job finished with no error."
    summaries = {
        path.parent.name.rpartition("-")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")
    }
    assert (summaries["train-2"]["step"], summaries["train-5"]["step"]) == (2, 7)
    assert summaries["infer-8"]["rows"] == 8
