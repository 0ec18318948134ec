"""Files that `gc` finds and removes, and files that it never touches."""

import functools
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from simpo_pipeline.errors import ConfigError, SimpoPipelineError, StorageError
from simpo_pipeline.executor.commands import litter
from simpo_pipeline.executor.commands.litter import (
    Item,
    Kind,
    Removal,
    find_litter,
    litter_text,
    removals_text,
    remove_litter,
)
from simpo_pipeline.executor.commands.survey import read_survey
from simpo_pipeline.executor.executor import PROBE_PREFIX, Executor
from simpo_pipeline.executor.records.holder import Holder, parse_holder
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseKeeper, LeaseWatch
from simpo_pipeline.executor.records.status import (
    CODE_FILE,
    ERROR_FILE,
    INFO_FILE,
    LEASE_FILE,
    MANIFEST_FILE,
    STATUS_FILE,
)
from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.step import ExecutorStep, output_path_of, take, this_output_path
from simpo_pipeline.storage.conditional import ConditionalFiles
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import list_files, read_bytes, remove_tree, write_bytes, write_text
from simpo_pipeline.storage.paths import base_name, join

HOUR = 3600.0
LATER = 1.1 * HOUR
FAR_AWAY = Holder("other-run", "another-host", 12, "2026-01-01T00:00:00+00:00")
LIVING = Holder.of_this_process("living-run")
GONE = replace(LIVING, run_id="gone-run", started="1")
TEMPORARY = f".rows.jsonl.{'0a' * 16}.tmp"


def write_rows(config: list[str]):
    write_text(join(config[0], "rows.jsonl"), "12345")
    write_text(join(config[0], "more/rows.jsonl"), "123")


def fail(config: list[str]):
    write_rows(config)
    raise ValueError("no such row")


GOOD = ExecutorStep("good", write_rows, [this_output_path()])
BAD = ExecutorStep("bad", fail, [this_output_path()])


def run(prefix: str, step: ExecutorStep) -> str:
    """Run the step, which may fail, and return its output path."""
    executor = Executor(prefix)
    try:
        executor.run([step])
    except SimpoPipelineError:
        pass
    return executor.output_paths[step]


@functools.cache
def files_of_a_failed_run() -> dict[str, bytes]:
    """Return the files that a failed step leaves, by path below the prefix.

    They are made once, because a run calls git and takes 0.1 s.
    """
    prefix = f"memory://{uuid.uuid4().hex}"
    path = run(prefix, BAD)
    files = {name: read_bytes(join(path, name)) for name in names(path)}
    remove_tree(prefix)
    return {f"{base_name(path)}/{name}": data for name, data in files.items()}


def make_failed(prefix: str) -> str:
    """Write the files of a failed step below the prefix and return its output path."""
    for name, data in files_of_a_failed_run().items():
        write_bytes(join(prefix, name), data)
    return join(prefix, next(iter(files_of_a_failed_run())).split("/")[0])


def found(prefix: str, later: float = LATER) -> list[tuple[str, str]]:
    """Return the kind and path of every piece of litter."""
    return [(item.kind.value, item.path) for item in find_litter(read_survey(prefix), time.time() + later)]


def collect(prefix: str, later: float = LATER) -> list[Removal]:
    return remove_litter(prefix, find_litter(read_survey(prefix), time.time() + later))


def names(path: str) -> list[str]:
    return [entry.relative_path for entry in list_files(path)]


def test_nothing_is_collected_where_no_attempt_left_files(prefix):
    run(prefix, GOOD)
    run(prefix, ExecutorStep("after", write_rows, [this_output_path(), output_path_of(BAD)]))
    remove_tree(make_failed(prefix))
    assert found(prefix, 1000 * HOUR) == []


@pytest.mark.parametrize("status", ["FAILED", "DEP_FAILED", "CANCELLED", "RUNNING", "nonsense", None])
def test_files_left_by_an_attempt_are_collected_except_its_records(prefix, status):
    path = make_failed(prefix)
    write_text(join(path, MANIFEST_FILE), "of an earlier attempt")
    remove_tree(join(path, STATUS_FILE))
    if status is not None:
        write_text(join(path, STATUS_FILE), status)
    before = names(path)
    assert found(prefix, 0.9 * HOUR) == []
    assert found(prefix) == [("attempt", base_name(path))]
    assert names(path) == before
    (removal,) = collect(prefix)
    assert [entry.relative_path.split("/", 1)[1] for entry in removal.removed] == [
        "more/rows.jsonl",
        "rows.jsonl",
        MANIFEST_FILE,
    ]
    kept = [INFO_FILE, *([STATUS_FILE] if status is not None else []), ERROR_FILE]
    assert (removal.why_left, names(path)) == (None, kept)
    assert found(prefix) == []


def test_after_a_collection_the_step_runs_again(prefix):
    path = run(prefix, BAD)
    collect(prefix)
    assert run(prefix, replace(BAD, fn=write_rows)) == path
    assert found(prefix) == []
    assert read_survey(prefix).steps[0].record.done


def test_only_files_missing_from_the_manifest_of_a_good_step_are_collected(prefix):
    path = run(prefix, GOOD)
    write_text(join(path, "more/left"), "by an earlier attempt")
    assert found(prefix, 0.9 * HOUR) == []
    (removal,) = collect(prefix)
    assert [base_name(entry.relative_path) for entry in removal.removed] == ["left"]
    assert names(path) == [CODE_FILE, INFO_FILE, STATUS_FILE, MANIFEST_FILE, "more/rows.jsonl", "rows.jsonl"]
    assert read_survey(prefix).steps[0].record.done


def test_the_listing_alone_shows_that_a_good_step_has_no_litter(prefix, monkeypatch):
    run(prefix, GOOD)
    survey = read_survey(prefix)

    def unasked(path: str) -> Any:
        raise AssertionError(f"{path} was read")

    for name in ("read_manifest", "read_info", "read_bytes"):
        monkeypatch.setattr(litter, name, unasked)
    assert find_litter(survey, time.time() + LATER) == []


def test_a_success_that_contradicts_its_manifest_is_left_to_its_owner(prefix):
    path = run(prefix, GOOD)
    write_text(join(path, "rows.jsonl"), "1")
    write_text(join(path, "left"), "by an earlier attempt")
    assert found(prefix) == []


@pytest.mark.parametrize("kept", [INFO_FILE, "elsewhere"])
def test_files_that_may_not_belong_to_an_attempt_are_left_to_their_owner(prefix, kept):
    """Without an info file no attempt is known. A path chosen by an experiment may have had files before."""
    path = make_failed(prefix) if kept == INFO_FILE else run(prefix, BAD.with_output_path("elsewhere"))
    if kept == INFO_FILE:
        remove_tree(join(path, INFO_FILE))
    assert found(prefix) == []


@pytest.mark.parametrize("holder", [LIVING, FAR_AWAY])
def test_a_step_is_not_collected_until_its_lease_was_not_renewed_for_an_hour(prefix, holder):
    path = make_failed(prefix)
    write_text(join(path, TEMPORARY), "1")
    write_text(join(path, STATUS_FILE), "RUNNING")
    write_bytes(join(path, LEASE_FILE), holder.encode())
    assert found(prefix, 0.9 * HOUR) == []
    assert [kind for kind, _ in found(prefix)] == ["temporary", "attempt"]


def test_a_step_with_a_living_holder_is_not_collected_however_old_it_is(prefix):
    path = make_failed(prefix)
    write_text(join(path, TEMPORARY), "1")
    write_bytes(join(path, LEASE_FILE), FAR_AWAY.encode())
    survey = read_survey(prefix)
    (step,) = survey.steps
    old = tuple(replace(entry, modified=0.0) for entry in step.files)
    assert find_litter(replace(survey, steps=(replace(step, files=old),))) == []


def test_files_left_by_a_dead_holder_are_collected_immediately(prefix):
    path = make_failed(prefix)
    name = base_name(path)
    write_text(join(path, "more", TEMPORARY), "1")
    urgent = f".{LEASE_FILE}.{'0a' * 16}.tmp"  # from a job that is taking the lease over right now
    write_text(join(path, urgent), "1")
    write_text(join(path, STATUS_FILE), "RUNNING")
    write_bytes(join(path, LEASE_FILE), GONE.encode())
    assert found(prefix, 0.0) == [("temporary", f"{name}/more/{TEMPORARY}"), ("attempt", name)]
    assert all(removal.why_left is None for removal in collect(prefix, 0.0))
    assert names(path) == [urgent, INFO_FILE, STATUS_FILE, ERROR_FILE]
    assert found(prefix) == [("temporary", f"{name}/{urgent}")]


def test_a_step_that_failed_an_hour_after_its_last_output_is_young(prefix):
    make_failed(prefix)
    survey = read_survey(prefix)
    (step,) = survey.steps
    old = tuple(
        replace(entry, modified=0.0 if step.name_of(entry) != STATUS_FILE else time.time()) for entry in step.files
    )
    survey = replace(survey, steps=(replace(step, files=old),))
    assert find_litter(survey) == []
    assert len(find_litter(survey, time.time() + LATER)) == 1


def test_a_step_that_finishes_during_the_survey_is_left_alone(prefix):
    """The files were listed while the step ran, and the record was read after its lease was released."""
    path = make_failed(prefix)
    survey = read_survey(prefix)
    write_text(join(path, STATUS_FILE), "FAILED")
    (ended,) = read_survey(prefix).steps
    survey = replace(survey, steps=(replace(survey.steps[0], record=ended.record),))
    assert find_litter(survey, time.time() + LATER) == []


def test_a_lease_not_renewed_for_an_hour_does_not_prevent_collection(prefix):
    path = make_failed(prefix)
    write_bytes(join(path, LEASE_FILE), FAR_AWAY.encode())
    (removal,) = collect(prefix)
    assert removal.why_left is None
    assert names(path) == [INFO_FILE, STATUS_FILE, ERROR_FILE]


def test_files_of_unknown_age_count_as_young(prefix):
    make_failed(prefix)
    write_text(join(prefix, TEMPORARY), "1")
    survey = read_survey(prefix)
    (step,) = survey.steps
    ageless = replace(step, files=tuple(replace(entry, modified=None) for entry in step.files))
    others = tuple(replace(entry, modified=None) for entry in survey.others)
    assert find_litter(replace(survey, steps=(ageless,), others=others), time.time() + 1000 * HOUR) == []


def make_scratch(prefix: str, holder: Holder | None) -> str:
    """Write the scratch files that a run leaves if its replay fails or it is killed. Return their folder."""
    write_text(join(prefix, ".replay/0a1b2c3d4e5f/train-2-77f45492/rows.jsonl"), "12345")
    if holder is not None:
        write_bytes(join(prefix, ".replay/0a1b2c3d4e5f", LEASE_FILE), holder.encode())
    return ".replay/0a1b2c3d4e5f"


def test_the_scratch_of_a_replay_that_failed_is_collected_after_an_hour(prefix):
    def make(config: list[str]) -> Live:
        write_text(join(config[0], "log"), "1")
        return Live(1, digest=str(time.perf_counter_ns()))  # differs at each call, so that the replay fails

    made = ExecutorStep("made", make, [this_output_path()])
    run(prefix, made)
    run(prefix, ExecutorStep("use", lambda config: None, [take(made)]))
    assert found(prefix, 0.9 * HOUR) == []
    ((kind, path),) = found(prefix)
    assert (kind, path.split("/")[0]) == ("scratch", ".replay")
    (removal,) = collect(prefix)
    assert (removal.why_left, len(removal.removed)) == (None, 2)
    assert not [name for name in names(prefix) if name.startswith(".replay")]


@pytest.mark.parametrize(
    ("holder", "later", "expected"),
    [(LIVING, 0.9 * HOUR, 0), (FAR_AWAY, 0.9 * HOUR, 0), (FAR_AWAY, LATER, 1), (GONE, 0.0, 1), (None, LATER, 1)],
)
def test_scratch_is_collected_when_its_run_is_over(prefix, holder, later, expected):
    path = make_scratch(prefix, holder)
    write_text(join(prefix, path, TEMPORARY), "part of the scratch")
    assert found(prefix, later) == [("scratch", path)] * expected
    assert len(collect(prefix, later)) == expected
    assert bool(names(prefix)) == (expected == 0)


def test_scratch_whose_lease_changes_before_removal_is_left_alone(prefix):
    path = make_scratch(prefix, None)
    items = find_litter(read_survey(prefix), time.time() + LATER)
    write_bytes(join(prefix, path, LEASE_FILE), LIVING.encode())
    (removal,) = remove_litter(prefix, items)
    assert (removal.removed, removal.why_left) == ((), "its lease changed since it was listed")
    assert len(names(prefix)) == 2


def test_probes_and_temporary_files_are_collected_wherever_they_are_left(prefix):
    run(prefix, GOOD)
    probe = f"{PROBE_PREFIX}0a1b2c3d4e5f"
    left = [TEMPORARY, f"experiments/{TEMPORARY}", f"tracking/run/{TEMPORARY}"]
    for name in [probe, *left]:
        write_text(join(prefix, name), "1")
    for name in [f"notes/{probe}", f"{PROBE_PREFIX}notes", ".rows.tmp", f"rows.{'0a' * 16}.tmp"]:
        write_text(join(prefix, name), "not of the executor's making")
    assert found(prefix, 0.9 * HOUR) == []
    assert found(prefix) == [("probe", probe), *(("temporary", name) for name in left)]


def test_folders_that_are_not_steps_are_left_alone(prefix):
    run(prefix, GOOD)
    for name in (
        "experiments/x.json",
        "tracking/a/metrics.jsonl",
        "photos/me.png",
        "notes.txt",
        "half/.executor.x",
        ".replay/x",
    ):
        write_text(join(prefix, name), "mine")
    write_bytes(join(prefix, "begun", LEASE_FILE), FAR_AWAY.encode())
    assert found(prefix, 1000 * HOUR) == []


def test_a_file_rewritten_before_removal_survives(prefix):
    path = make_failed(prefix)
    items = find_litter(read_survey(prefix), time.time() + LATER)
    write_text(join(path, "rows.jsonl"), "new")
    (removal,) = remove_litter(prefix, items)
    assert removal.why_left == f"{base_name(path)}/rows.jsonl was written again since it was listed"
    assert not removal.failed
    assert read_bytes(join(path, "rows.jsonl")) == b"new"
    assert not names(join(path, "more"))


def take_lease(path: str):
    write_bytes(join(path, LEASE_FILE), LIVING.encode())


def begin(path: str):
    write_text(join(path, STATUS_FILE), "RUNNING")


def run_and_end(path: str):
    write_text(join(path, STATUS_FILE), "FAILED")


@pytest.mark.parametrize(
    ("change", "holder"), [(take_lease, None), (take_lease, GONE), (begin, GONE), (run_and_end, None)]
)
def test_a_step_that_a_job_changes_before_removal_is_skipped(prefix, change: Callable[[str], Any], holder):
    path = make_failed(prefix)
    write_text(join(path, TEMPORARY), "1")
    if holder is not None:
        write_bytes(join(path, LEASE_FILE), holder.encode())
    items = find_litter(read_survey(prefix), time.time() + LATER)
    assert len(items) == 2
    change(path)
    removals = remove_litter(prefix, items)
    assert [(removal.removed, removal.failed) for removal in removals] == [((), False)] * 2
    assert removals_text(prefix, removals, as_json=False).splitlines() == [
        f"skipped {base_name(path)}/{TEMPORARY}: its lease or status changed since it was listed",
        f"skipped {base_name(path)}: its lease or status changed since it was listed",
        "removed 0 items, 0 B.",
    ]
    assert {"rows.jsonl", "more/rows.jsonl", TEMPORARY} <= set(names(path))


def test_no_job_begins_a_step_while_its_litter_is_removed(prefix, monkeypatch):
    path = make_failed(prefix)
    remove, acquired, holders = ConditionalFiles.remove, list[bool](), list[Holder | None]()
    watch = LeaseWatch(LeaseConfig())

    def watched(self: ConditionalFiles, at: str, expected: str) -> bool:
        lease = join(path, LEASE_FILE)
        if at != lease:
            holders.append(parse_holder(read_bytes(lease)))
            with LeaseKeeper("starting", LeaseConfig(), watch, self) as leases:
                acquired.append(leases.acquire(lease))
        return remove(self, at, expected)

    monkeypatch.setattr(ConditionalFiles, "remove", watched)
    (removal,) = collect(prefix)
    assert removal.why_left is None
    assert acquired == [False, False]
    assert all(holder is not None and holder.run_id.startswith("gc-") for holder in holders)
    assert LEASE_FILE not in names(path)


def test_a_storage_failure_does_not_prevent_other_removals(prefix, monkeypatch):
    path = make_failed(prefix)
    make_scratch(prefix, None)
    write_text(join(prefix, TEMPORARY), "1")
    remove = ConditionalFiles.remove

    def broken(self: ConditionalFiles, at: str, expected: str) -> bool:
        if base_name(at) == "rows.jsonl" and at.startswith(join(path, "more")):
            raise StorageError(f"Cannot remove {at!r}: the disk is read-only.")
        return remove(self, at, expected)

    monkeypatch.setattr(ConditionalFiles, "remove", broken)
    removals = collect(prefix)
    assert [(removal.item.kind, removal.failed) for removal in removals] == [
        (Kind.SCRATCH, False),
        (Kind.TEMPORARY, False),
        (Kind.ATTEMPT, True),
    ]
    assert [len(removal.removed) for removal in removals] == [1, 1, 1]
    assert removals[2].why_left == f"Cannot remove {join(path, 'more/rows.jsonl')!r}: the disk is read-only."
    assert "more/rows.jsonl" in names(path)


def test_nothing_is_removed_without_conditional_writes():
    with pytest.raises(ConfigError, match="does not support conditional writes"):
        remove_litter("s3://bucket/runs", [])


ITEMS = [
    Item(Kind.SCRATCH, ".replay/0a1b", (FileEntry(".replay/0a1b/x", 5 << 20), FileEntry(".replay/0a1b/y", 3 << 19))),
    Item(Kind.ATTEMPT, "train-2-77f45492", (FileEntry("train-2-77f45492/x", 12),)),
]


def test_the_text_table_is_human_readable():
    table = [
        "kind     path              files     size",
        "-------  ----------------  -----  -------",
        "scratch  .replay/0a1b          2  6.5 MiB",
        "attempt  train-2-77f45492      1     12 B",
    ]
    assert litter_text("runs", ITEMS, as_json=False).splitlines() == [
        *table,
        "2 items, 6.5 MiB. Add --delete to remove them.",
    ]
    removals = [Removal(item, item.files) for item in ITEMS]
    assert removals_text("runs", removals, as_json=False).splitlines() == [*table, "removed 2 items, 6.5 MiB."]
    partly = [Removal(ITEMS[0], ITEMS[0].files[1:], "it is busy"), Removal(ITEMS[1], (), "no disk", failed=True)]
    assert removals_text("runs", partly, as_json=False).splitlines() == [
        "kind     path          files     size",
        "-------  ------------  -----  -------",
        "scratch  .replay/0a1b      1  1.5 MiB",
        "skipped .replay/0a1b: it is busy",
        "removed 1 item, 1.5 MiB.",
    ]
    assert litter_text("runs", [], as_json=False) == "Nothing to collect."
    assert removals_text("runs", [], as_json=False) == "Nothing to collect."


def test_the_json_object_has_plain_numbers():
    scratch = {"kind": "scratch", "path": ".replay/0a1b", "files": 2, "bytes": 13 << 19}
    attempt = {"kind": "attempt", "path": "train-2-77f45492", "files": 1, "bytes": 12}
    total = {"files": 3, "bytes": (13 << 19) + 12}
    listed = {"prefix": "runs", "deleted": False, "items": [scratch, attempt], **total, "left": []}
    assert json.loads(litter_text("runs", ITEMS, as_json=True)) == listed
    removals = [Removal(ITEMS[0], ITEMS[0].files), Removal(ITEMS[1], (), "no disk", failed=True)]
    assert json.loads(removals_text("runs", removals, as_json=True)) == {
        "prefix": "runs",
        "deleted": True,
        "items": [scratch],
        "files": 2,
        "bytes": 13 << 19,
        "left": [{"kind": "attempt", "path": "train-2-77f45492", "reason": "no disk", "storage_failed": True}],
    }


def test_extra_files_in_an_output_path_chosen_by_the_experiment_are_left_alone(prefix):
    chosen = replace(GOOD, override_output_path="shared")
    run(prefix, chosen)
    write_text(join(prefix, "shared/somebodys.txt"), "mine")
    write_text(join(run(prefix, GOOD), "stray.txt"), "left by an earlier attempt")
    items = find_litter(read_survey(prefix), time.time() + LATER)
    assert [[base_name(entry.relative_path) for entry in item.files] for item in items] == [["stray.txt"]]
