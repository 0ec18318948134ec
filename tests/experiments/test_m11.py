"""M11 on `tiny`, in real processes: interleaving changes nothing, a kill leads to a replay, no writes in between."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
COUNTING = "m11_counting_compilations.py"
STEPS = ("fetch_model", "prepare_pairs", "train-2", "infer-128", "train-5", "report")


@pytest.fixture(scope="session")
def command(python):
    """Return a function that builds the command line of one of the scripts."""

    def make(script: str, prefix: pathlib.Path, *flags: str, preset: str = "tiny") -> list[str]:
        folder = "tests/experiments" if script == COUNTING else "experiments"
        return [*python, str(ROOT / folder / script), "--preset", preset, "--prefix", str(prefix), *flags]

    return make


@pytest.fixture(scope="session")
def tiny_environment(unoptimised) -> dict[str, str]:
    """The environment of every job on `tiny`: digests are only comparable between jobs that are compiled alike."""
    return os.environ | unoptimised


@pytest.fixture(scope="session")
def run(command, tiny_environment):
    """Run a script, require that it succeeds, and return its output."""

    def run_script(*words: Any, environment: dict[str, str] = tiny_environment, **options: str) -> str:
        done = subprocess.run(command(*words, **options), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run_script


def outputs(prefix: pathlib.Path, step: str) -> pathlib.Path:
    (folder,) = prefix.glob(f"{step}-*")
    return folder


def summary(prefix: pathlib.Path, step: str) -> dict:
    return json.loads((outputs(prefix, step) / "summary.json").read_text())


def actions(text: str) -> dict[str, str]:
    """Return the action of each step in the plan that a run prints."""
    rows = (line.split() for line in text.splitlines())
    found = {row[0]: row[1] for row in rows if len(row) > 1 and row[0] in STEPS and row[1].isupper()}
    assert set(found) == set(STEPS), text
    return found


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> pathlib.Path:
    """Return a prefix with a finished M11, shared by the read-only tests."""
    prefix = tmp_path_factory.mktemp("m11")
    text = run("m11_interleave.py", prefix)
    assert text.splitlines()[-1] == "Job finished with no error."
    return prefix


@pytest.fixture
def prefix(finished, tmp_path) -> pathlib.Path:
    """Return a copy of the finished prefix, for tests that change it."""
    subprocess.run(["cp", "-r", f"{finished}/.", str(tmp_path)], check=True)
    return tmp_path


def test_interleaving_changes_nothing(run, finished):
    run("simpo_uninterrupted.py", finished)
    interleaved, uninterrupted = summary(finished, "train-5"), summary(finished, "train-7")
    assert interleaved["step"] == uninterrupted["step"] == 7
    assert interleaved["state_digest"] == uninterrupted["state_digest"]
    assert interleaved["state_digest"] != summary(finished, "train-2")["state_digest"]


def test_every_output_folder_contains_its_records(finished):
    own_files = {
        "train-2": {"metrics.jsonl"},
        "train-5": {"metrics.jsonl"},
        "infer-128": {"host_0000_of_0001.jsonl", "all_hosts_merged_of_0001.jsonl"},
        "report": {"report.md", "report.html"},
    }
    for step in STEPS:
        folder = outputs(finished, step)
        names = {path.name for path in folder.iterdir()}
        needed = {".executor_info", ".executor_status", "manifest.json", "summary.json", *own_files.get(step, set())}
        assert needed <= names, f"{step}: {needed - names} missing"
        assert (folder / ".executor_status").read_text() == "SUCCESS"
        listed = {entry["path"] for entry in json.loads((folder / "manifest.json").read_text())["files"]}
        assert own_files.get(step, set()) | {"summary.json"} <= listed


def test_every_prompt_has_a_row_and_every_row_a_finish_reason(finished):
    folder = outputs(finished, "infer-128")
    rows = [json.loads(line) for line in (folder / "all_hosts_merged_of_0001.jsonl").read_text().splitlines()]
    assert [row["global_prompt_index"] for row in rows] == list(range(128))
    for row in rows:
        assert row["step"] == 2
        assert row["finish_reason"] in ("stop", "length")
        assert len(row["generated_tokens"]) == row["generated_token_count"] > 0
        assert row["finish_reason"] == "stop" or row["generated_token_count"] == 16
    figures = summary(finished, "infer-128")
    assert figures["prompts"] == 128
    assert figures["generated_tokens"] == sum(row["generated_token_count"] for row in rows)
    assert min(figures[name] for name in ("prefill_seconds", "decode_seconds", "tokens_per_second")) > 0


def test_metrics_have_a_row_for_every_update_with_every_metric(finished):
    rows = [
        json.loads(line)
        for step in ("train-2", "train-5")
        for line in (outputs(finished, step) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    others = {"loss", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}
    for row in rows:
        assert rewards | others | {"step_seconds"} <= set(row)


def test_a_second_run_skips_every_step(run, tiny_environment, prefix):
    before = {path: path.stat().st_mtime_ns for path in prefix.glob("*-*/*")}
    # Without a platform, every use of a device fails.
    environment = {**tiny_environment, "JAX_PLATFORMS": "none"}
    text = run("m11_interleave.py", prefix, environment=environment)
    assert set(actions(text).values()) == {"SKIP"}
    assert {path: path.stat().st_mtime_ns for path in prefix.glob("*-*/*")} == before


def test_a_lost_train_5_is_recomputed_by_replaying_train_2(run, prefix):
    digest = summary(prefix, "train-5")["state_digest"]
    rows = (outputs(prefix, "infer-128") / "host_0000_of_0001.jsonl").stat().st_mtime_ns
    (outputs(prefix, "train-5") / ".executor_status").unlink()
    text = run("m11_interleave.py", prefix)
    planned = actions(text)
    assert [planned[step] for step in ("train-2", "infer-128", "train-5")] == ["REPLAY", "SKIP", "RUN"]
    assert "train-5" in next(line for line in text.splitlines() if line.split()[:2] == ["train-2", "REPLAY"])
    assert summary(prefix, "train-5")["state_digest"] == digest
    assert (outputs(prefix, "infer-128") / "host_0000_of_0001.jsonl").stat().st_mtime_ns == rows


def test_training_again_compiles_nothing_and_reports_the_time_saved(run, prefix):
    digest = summary(prefix, "train-2")["state_digest"]
    text = run(COUNTING, prefix, "--force", "train-2")
    planned = actions(text)
    assert [planned[step] for step in ("train-2", "infer-128", "train-5")] == ["RUN", "SKIP", "SKIP"]
    assert re.search(r"JAX COMPILED 0 OF [1-9]\d* PROGRAMS", text), text
    assert re.search(r"compilation cache: read [1-9]\d* programs, which saved at least \d+\.\d s, and compiled 0", text)
    assert summary(prefix, "train-2")["state_digest"] == digest


@pytest.mark.slow
def test_a_job_killed_in_train_5_resumes_to_the_same_digest(run, command, python, tiny_environment, finished, tmp_path):
    digest = summary(finished, "train-5")["state_digest"]
    # Started as its own process: with a fork, the kill would reach the client first.
    words = [sys.executable, *command("m11_interleave.py", tmp_path)[len(python) :]]
    job = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=tiny_environment)
    try:
        deadline = time.monotonic() + 240
        while not any(path.stat().st_size for path in tmp_path.glob("train-5-*/metrics.jsonl")):
            assert time.monotonic() < deadline and job.poll() is None, "train-5 never wrote a metric"
            time.sleep(0.005)
        os.kill(job.pid, signal.SIGKILL)
    finally:
        job.kill()
        job.wait()
    planned = actions(run("m11_interleave.py", tmp_path))
    assert [planned[step] for step in ("train-2", "infer-128", "train-5")] == ["REPLAY", "SKIP", "RUN"]
    assert summary(tmp_path, "train-5")["state_digest"] == digest


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_for_the_whole_job(command, tiny_environment, prefix):
    for step in ("train-2", "infer-128", "train-5"):
        (outputs(prefix, step) / ".executor_status").unlink()
    environment = {**tiny_environment, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ("--tracker", "wandb")
    done = subprocess.run(command("m11_interleave.py", prefix, *flags), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Job finished with no error."
    assert len(list((prefix / "tracking" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("preset", ["tiny", "smollm2", "llama3_8b_v5p_32"])
def test_a_dry_run_prints_the_plan_and_touches_nothing(run, preset, tmp_path):
    prefix = tmp_path / "prefix"
    text = run("m11_interleave.py", prefix, "--dry_run", preset=preset)
    assert set(actions(text).values()) == {"RUN"}
    assert not prefix.exists()


def test_an_unknown_preset_is_reported_in_one_sentence(command, tmp_path):
    done = subprocess.run(command("m11_interleave.py", tmp_path, preset="huge"), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--preset 'huge' is unknown; choose one of tiny, smollm2, llama3_8b_v5p_32" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_interleaving_changes_nothing_on_a_real_model(run, tmp_path):
    for script in ("m11_interleave.py", "simpo_uninterrupted.py"):
        run(script, tmp_path, preset="smollm2", environment=dict(os.environ))  # optimised code
    assert summary(tmp_path, "train-5")["state_digest"] == summary(tmp_path, "train-7")["state_digest"]
