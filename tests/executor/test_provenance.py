"""Provenance in the records of a run, and the secrets that they must never contain."""

import subprocess
import sys
from pathlib import Path

import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records import provenance
from simpo_pipeline.executor.records.provenance import find_provenance
from simpo_pipeline.executor.step import ExecutorStep, this_output_path
from simpo_pipeline.storage.files import list_files, read_json, read_text, write_text
from simpo_pipeline.storage.paths import join


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a script in a new git repository, with `sys.argv` as if it had been started."""
    path = tmp_path / "repository" / "experiment.py"
    path.parent.mkdir()
    path.write_text("first")
    git(path.parent, "init", "-q")
    git(path.parent, "add", "experiment.py")
    git(path.parent, "commit", "-qm", "first")
    monkeypatch.setattr(sys, "argv", [str(path), "--prefix", "gs://b/p", "--hf_token", "secret-8132"])
    return path


def test_the_commit_of_the_script_and_whether_it_was_changed_are_recorded(script):
    found = find_provenance(4)
    assert found.git_commit == git(script.parent, "rev-parse", "HEAD").strip()
    assert found.git_dirty is False
    (script.parent / "untracked").write_text("")
    assert find_provenance(4).git_dirty is False
    script.write_text("second")
    assert find_provenance(4).git_dirty is True


def test_outside_of_a_repository_or_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "experiment.py")])
    monkeypatch.chdir(tmp_path)
    assert find_provenance(1).git_commit is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_provenance(1).git_dirty is None


def test_records_contain_user_command_and_dates_and_no_environment_variable(prefix, script, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "do-not-tell-7461")
    config = {"out": this_output_path(), "api_key": "secret-5519", "eos_token": "</s>"}
    step = ExecutorStep("step", lambda config: write_text(join(config["out"], "x"), "x"), config)
    job = Executor(prefix)
    job.run([step])
    assert read_json(join(job.output_paths[step], ".executor_info"))["config"]["eos_token"] == "</s>"
    assert job.executor_info_path is not None
    for record in (read_json(join(job.output_paths[step], ".executor_info")), read_json(job.executor_info_path)):
        assert record["argv"] == [str(script), "--prefix", "gs://b/p", "--hf_token", "***"]
        assert record["git_commit"] == git(script.parent, "rev-parse", "HEAD").strip()
        assert record["user"] and record["host_name"] and record["python_version"]
        assert record["process_count"] == 1
        assert {"jax", "fsspec", "simpo-pipeline"} <= set(record["packages"])
        assert record["created_date"] <= record["finished_date"]
    assert read_json(job.executor_info_path)["actions"] == {job.output_paths[step]: "RUN"}
    texts = [read_text(join(prefix, entry.relative_path)) for entry in list_files(prefix)]
    assert not any(secret in text for text in texts for secret in ("do-not-tell-7461", "secret-8132", "secret-5519"))


def test_the_record_of_a_failed_run_contains_its_end(prefix):
    def fail(config: None) -> None:
        raise ValueError("no")

    job = Executor(prefix)
    with pytest.raises(Exception, match="no"):
        job.run([ExecutorStep("step", fail, None)])
    assert job.executor_info_path is not None
    record = read_json(job.executor_info_path)
    assert record["finished_date"] is not None
    assert list(record["actions"].values()) == ["FAILED"]


def test_a_hanging_git_command_times_out(script, monkeypatch):
    slow = script.parent / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:/bin:/usr/bin")
    monkeypatch.setattr(provenance, "_GIT_SECONDS", 0.1)
    assert find_provenance(1).git_commit is None
