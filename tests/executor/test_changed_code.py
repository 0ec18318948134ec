"""A plan says that the code of a step changed since it ran. The version stays the same."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.planning import plan
from simpo_pipeline.executor.records.code import SourceFingerprints
from simpo_pipeline.executor.step import ExecutorStep
from simpo_pipeline.storage.files import read_json, write_json

STEP = """
from simpo_pipeline.executor.step import imported_step
work = imported_step("step_body.work", module=__name__, takes=())
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a folder with a step in two modules. The second is imported when the step runs."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "step_config.py").write_text(STEP)
    (folder / "step_body.py").write_text("def work(config): pass\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("step_config", "step_body"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(modules, tmp_path):
    """Return a function that makes a plan, carries it out, and returns its only row."""
    step = ExecutorStep("work", importlib.import_module("step_config").work, None)

    def run_steps(**options: Any) -> Any:
        executor = Executor(str(tmp_path / "runs"))
        executor.run([step], **options)
        return executor.plan[0]

    return run_steps


@pytest.mark.parametrize("name", ["step_config", "step_body"])
def test_the_plan_names_the_module_that_changed_and_the_flag_that_runs_the_step_again(run, modules, name):
    first = run()
    assert run(dry_run=True).reason == "SUCCESS is recorded"
    source = modules / f"{name}.py"
    source.write_text(source.read_text() + "changed = True\n")
    row = run(dry_run=True)
    assert (row.action, row.version) == ("SKIP", first.version)
    assert row.reason == f"SUCCESS is recorded; code changed since it ran ({name}): --force work runs it again"
    run(force=["work"])
    assert run(dry_run=True).reason == "SUCCESS is recorded"


def test_planning_does_not_import_the_body(run, modules):
    run(dry_run=True)
    assert "step_body" not in sys.modules
    fingerprints = SourceFingerprints().of(importlib.import_module("step_config").work)
    assert set(fingerprints) == {"step_config", "step_body"}
    assert "step_body" not in sys.modules


def test_a_record_without_fingerprints_and_code_without_source_say_nothing(run):
    row = run()
    path = os.path.join(row.output_path, ".executor_info")
    info = read_json(path)
    assert set(info["code"]) == {"step_config", "step_body"}
    for recorded in ({}, None, "?", []):
        write_json(path, {**info, "code": recorded})
        assert run(dry_run=True).reason == "SUCCESS is recorded"
    os.remove(path)
    assert run(dry_run=True).reason == "SUCCESS is recorded"
    assert SourceFingerprints().of(print) == SourceFingerprints().of(None) == {}


def test_only_a_limited_number_of_records_is_read(run, monkeypatch):
    run()
    monkeypatch.setattr(plan, "_MAX_RECORDS_READ", 0)
    monkeypatch.setattr(plan, "changed_code", None)
    assert run(dry_run=True).reason == "SUCCESS is recorded"


def test_on_remote_storage_only_an_explanation_reads_the_record(modules):
    step = ExecutorStep("work", importlib.import_module("step_config").work, None)
    executor = Executor(f"memory://{modules.parent.name}/runs")
    executor.run([step])
    (modules / "step_body.py").write_text("def work(config): return None\n")
    executor.run([step], dry_run=True)
    assert executor.plan[0].reason == "SUCCESS is recorded"
    assert "code changed since it ran (step_body)" in executor.explain("work")[0].reason
