"""A plan says that the code of a step changed since it ran. The version stays the same."""

import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records.code import SourceFingerprints
from simpo_pipeline.executor.step import ExecutorStep, versioned
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
    (folder / "step_body.py").write_text("def work(config):\n    pass\n")
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


@pytest.mark.parametrize(
    ("source", "is_changed"),
    [
        ("# comment\n\n\ndef work(\n    config\n):\n    'Docstring.'\n\n    pass  # comment\n", False),
        ('"""Docstring."""\r\ndef work(config):\r\n\tpass\r\n', False),
        ("def work(config):\n    return 'Docstring.'\n", True),
        ("def work(config, more=None):\n    pass\n", True),
        ("def work(config:\n    pass\n", True),
        ("", True),
    ],
)
def test_only_what_python_executes_counts_as_code(run, modules, source, is_changed):
    run()
    (modules / "step_body.py").write_bytes(source.encode())
    assert ("code changed" in run(dry_run=True).reason) == is_changed


def named(module: Any) -> Any:
    function = types.FunctionType((lambda config: None).__code__, {})
    function.__module__ = module
    return function


def test_a_function_without_source_has_no_fingerprint(modules, monkeypatch):
    (modules / "broken").mkdir()
    (modules / "broken" / "__init__.py").write_text("raise RuntimeError('broken')")
    monkeypatch.setitem(sys.modules, "notebook", types.ModuleType("notebook"))
    for module in ("notebook", "missing", "missing.inner", "broken.inner", "..relative", "", "sys", None, 1):
        assert SourceFingerprints().of(named(module)) == {}
    for function in (print, None, functools.partial(print), named("notebook"), object(), int):
        assert SourceFingerprints().of(function) == {}
    for function in (lambda config: None, functools.partial(named(__name__), 1), functools.lru_cache(named(__name__))):
        assert set(SourceFingerprints().of(function)) == {__name__}


def test_planning_does_not_import_the_body(run, modules):
    run(dry_run=True)
    assert "step_body" not in sys.modules
    fingerprints = SourceFingerprints().of(importlib.import_module("step_config").work)
    assert set(fingerprints) == {"step_config", "step_body"}
    assert "step_body" not in sys.modules


def test_a_record_without_fingerprints_and_code_without_source_say_nothing(run):
    row = run()
    path = os.path.join(row.output_path, ".executor_code")
    assert set(read_json(path)) == {"step_config", "step_body"}
    for recorded in ({}, None, "?", []):
        write_json(path, recorded)
        assert run(dry_run=True).reason == "SUCCESS is recorded"
    os.remove(path)
    assert run(dry_run=True).reason == "SUCCESS is recorded"


def test_on_cloud_storage_only_the_record_of_changed_code_is_read(modules, gcs, gcs_here):
    work = importlib.import_module("step_config").work
    steps = [ExecutorStep("work", work, versioned(number)) for number in range(3)]
    executor = Executor(gcs_here)
    executor.run(steps)

    def planned() -> tuple[set[str], list[str]]:
        gcs.reset_log()
        executor.run(steps, dry_run=True)
        read = [os.path.basename(entry["path"]) for entry in gcs.log() if entry["kind"] != "list"]
        return {row.reason for row in executor.plan}, read

    assert planned() == ({"SUCCESS is recorded"}, [])
    (modules / "step_body.py").write_text("def work(config): return None\n")
    reasons, read = planned()
    assert reasons == {"SUCCESS is recorded; code changed since it ran (step_body): --force work runs it again"}
    assert set(read) == {".executor_code"} and len(read) <= len(steps)
