"""The survey of a prefix and the report of `status`."""

import json
import time
from dataclasses import replace

import pytest

from simpo_pipeline.errors import ConfigError, StepFailedError
from simpo_pipeline.executor.commands.survey import (
    SeenLease,
    SeenStep,
    Survey,
    human_age,
    human_bytes,
    read_survey,
    status_text,
)
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.records.holder import Holder
from simpo_pipeline.executor.records.status import INFO_FILE, LEASE_FILE, STATUS_FILE, LeaseSight, Status, StepRecord
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, this_output_path
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import list_files, remove_tree, write_bytes, write_text
from simpo_pipeline.storage.paths import base_name, join

HOUR = 3600.0
FAR_AWAY = Holder("other-run", "another-host", 12, "2026-01-01T00:00:00+00:00")
LIVING = Holder.of_this_process("living-run")
GONE = replace(LIVING, run_id="gone-run", started="1")


def write_rows(config: list[str]):
    write_text(join(config[0], "rows/0.jsonl"), "12345")
    write_text(join(config[0], "rows/1.jsonl"), "123")


def fail(config: list[str]):
    write_text(join(config[0], "part.txt"), "1")
    raise ValueError("no such row")


GOOD = ExecutorStep("documents/fineweb", write_rows, [this_output_path()])
BAD = ExecutorStep("bad", fail, [this_output_path()])
AFTER = ExecutorStep("after", write_rows, [this_output_path(), output_path_of(BAD)])


def run_good(prefix: str) -> str:
    """Run one good step and return its output path."""
    executor = Executor(prefix)
    executor.run([GOOD])
    return executor.output_paths[GOOD]


def shown(survey: Survey, now: float | None = None) -> list[str | None]:
    return [step.shown_status(time.time() if now is None else now) for step in survey.steps]


def test_every_step_is_listed_with_its_status_and_outputs(prefix):
    executor = Executor(prefix)
    with pytest.raises(StepFailedError):
        executor.run([GOOD, AFTER])
    survey = read_survey(f"{prefix}/")
    paths = [executor.output_paths[step] for step in (AFTER, BAD, GOOD)]
    assert [join(survey.prefix, step.path) for step in survey.steps] == paths
    assert shown(survey) == ["DEP_FAILED", "FAILED", "SUCCESS"]
    names = [[step.name_of(output) for output in step.outputs] for step in survey.steps]
    assert names == [[], ["part.txt"], ["rows/0.jsonl", "rows/1.jsonl"]]
    assert {entry.relative_path.split("/")[0] for entry in survey.others} == {"experiments"}


def test_age_counts_from_the_last_change_of_the_status(prefix):
    run_good(prefix)
    (step,) = read_survey(prefix).steps
    age = step.age_seconds(time.time() + 5 * HOUR)
    assert age is not None
    assert 5 * HOUR <= age < 5 * HOUR + 60
    assert step.age_seconds(0.0) == 0.0


@pytest.mark.parametrize(
    ("holder", "later", "words"),
    [
        (LIVING, 0.0, "RUNNING"),
        (FAR_AWAY, 0.0, "RUNNING"),
        (FAR_AWAY, 0.9 * HOUR, "RUNNING"),
        (FAR_AWAY, 1.1 * HOUR, "RUNNING (abandoned)"),
        (GONE, 0.0, "RUNNING (abandoned)"),
        (None, 0.0, "RUNNING (abandoned)"),
    ],
)
def test_a_running_step_is_abandoned_when_no_living_job_can_hold_it(prefix, holder, later, words):
    path = run_good(prefix)
    write_text(join(path, STATUS_FILE), "RUNNING")
    if holder is not None:
        write_bytes(join(path, LEASE_FILE), holder.encode())
    survey = read_survey(prefix)
    assert shown(survey, time.time() + later) == [words]
    assert (survey.steps[0].lease.holder if survey.steps[0].lease else None) == holder


def test_damaged_outputs_and_unreadable_statuses_are_reported(prefix):
    path = run_good(prefix)
    write_text(join(path, "rows/0.jsonl"), "1")
    assert shown(read_survey(prefix)) == ["SUCCESS (damaged)"]
    (reported,) = json.loads(status_text(read_survey(prefix), as_json=True))["steps"]
    assert reported["damage"] == "lists rows/0.jsonl with 5 bytes, but it has 1"
    write_text(join(path, STATUS_FILE), "SUCCES")
    assert shown(read_survey(prefix)) == ["UNKNOWN"]
    remove_tree(join(path, STATUS_FILE))
    assert shown(read_survey(prefix)) == [None]
    assert " -  " in status_text(read_survey(prefix), as_json=False)


def test_the_outputs_of_a_replay_are_not_a_step(prefix):
    run_good(prefix)
    write_text(join(prefix, ".replay/run/train-1/", STATUS_FILE), "RUNNING")
    survey = read_survey(prefix)
    assert len(survey.steps) == 1
    assert ".replay/run/train-1/.executor_status" in [entry.relative_path for entry in survey.others]


def test_a_file_belongs_to_the_nearest_step_around_it(prefix):
    """Two experiments may nest their steps in each other: the executor checks only each experiment alone."""
    for path in ("data", "data/inner"):
        Executor(prefix).run([GOOD.with_output_path(path)])
    outer, inner = read_survey(prefix).steps
    assert (outer.path, inner.path) == ("data", "data/inner")
    assert [outer.name_of(output) for output in outer.outputs] == ["rows/0.jsonl", "rows/1.jsonl"]
    assert [inner.name_of(output) for output in inner.outputs] == ["rows/0.jsonl", "rows/1.jsonl"]


def test_a_step_that_changes_during_the_survey_is_detected(prefix):
    path = run_good(prefix)
    (step,) = read_survey(prefix).steps
    assert not step.is_changing
    write_text(join(path, STATUS_FILE), "RUNNING")
    (now,) = read_survey(prefix).steps
    assert replace(step, record=now.record).is_changing


def test_an_invalid_prefix_is_refused_with_a_hint(prefix):
    with pytest.raises(ConfigError, match=r"does not exist\. Pass the folder or URL"):
        read_survey(prefix)
    path = run_good(prefix)
    with pytest.raises(ConfigError, match=r"is the output path of one step\. Pass its prefix"):
        read_survey(path)
    with pytest.raises(ConfigError, match="is a file or an empty folder"):
        read_survey(join(path, INFO_FILE))
    with pytest.raises(ConfigError, match="URL that lost a slash"):
        read_survey("gs:/bucket")


def test_a_survey_writes_nothing(prefix):
    run_good(prefix)
    before = [(entry, entry.version) for entry in list_files(prefix)]
    read_survey(prefix)
    assert [(entry, entry.version) for entry in list_files(prefix)] == before


def seen(path: str, status: Status, size: int, age: float, lease: SeenLease | None) -> SeenStep:
    """Return a step as seen at time 100,000, whose files are `age` seconds old."""
    files = (
        FileEntry(f"{path}/{STATUS_FILE}", 7, modified=100_000.0 - age),
        FileEntry(f"{path}/rows.jsonl", size, modified=100_000.0 - age),
    )
    record = StepRecord(status, manifest_problem=None, lease=LeaseSight(lease.holder, True) if lease else None)
    return SeenStep(path, record, lease, files)


SEEN = Survey(
    "gs://bucket/runs",
    (
        seen("documents/fineweb-1a2b3c4d", Status.SUCCESS, 3 << 30, 2.1 * HOUR, None),
        seen("train-2-77f45492", Status.RUNNING, 12, 190.0, SeenLease(FAR_AWAY, 99_986.0)),
        seen("train-5-a3b2fe61", Status.RUNNING, 1536, 90.0, SeenLease(None, None)),
    ),
    (),
)


def test_the_text_table_is_human_readable():
    assert status_text(SEEN, 100_000.0, as_json=False).splitlines() == [
        "step                        status   age  holder                                     files     size",
        "--------------------------  -------  ---  -----------------------------------------  -----  -------",
        "documents/fineweb-1a2b3c4d  SUCCESS  2h                                                  1  3.0 GiB",
        "train-2-77f45492            RUNNING  3m   pid 12 on host another-host, beat 14s ago      1     12 B",
        "train-5-a3b2fe61            RUNNING  1m   an unreadable lease                            1  1.5 KiB",
    ]
    assert status_text(Survey("runs", (), ()), as_json=False) == "No steps."


def test_the_json_object_has_plain_numbers():
    report = json.loads(status_text(SEEN, 100_000.0, as_json=True))
    assert report["prefix"] == "gs://bucket/runs"
    assert report["steps"][0] == {
        "step": "documents/fineweb-1a2b3c4d",
        "status": "SUCCESS",
        "damage": None,
        "age_seconds": pytest.approx(2.1 * HOUR),
        "holder": None,
        "files": 1,
        "bytes": 3 << 30,
    }
    no_holder = dict.fromkeys(("run_id", "host_name", "pid", "beat_seconds"))
    assert [step["holder"] for step in report["steps"][1:]] == [
        {"run_id": "other-run", "host_name": "another-host", "pid": 12, "is_gone": False, "beat_seconds": 14.0},
        {**no_holder, "is_gone": False},
    ]
    assert json.loads(status_text(Survey("runs", (), ()), as_json=True)) == {"prefix": "runs", "steps": []}


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0, "0s"), (59.9, "59s"), (60.0, "1m"), (3599.0, "59m"), (7300.0, "2h"), (5.5e5, "6d")]
)
def test_ages_are_shown_in_their_largest_unit(seconds, words):
    assert human_age(seconds) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (7 << 30, "7.0 GiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_sizes_are_shown_in_their_largest_binary_unit(num_bytes, words):
    assert human_bytes(num_bytes) == words


def test_step_names_are_shown_relative_to_the_prefix(prefix):
    path = run_good(prefix)
    (reported,) = json.loads(status_text(read_survey(prefix), as_json=True))["steps"]
    assert reported["step"] == f"documents/{base_name(path)}"
    assert (reported["files"], reported["bytes"]) == (2, 8)
