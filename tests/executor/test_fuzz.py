"""With any files in the folder of a step, the executor does not crash and believes no false record."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from simpo_pipeline.errors import SimpoPipelineError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.main import ExecutorMainConfig, executor_main
from simpo_pipeline.executor.records.info import read_info
from simpo_pipeline.executor.records.lease import LeaseConfig, LeaseWatch
from simpo_pipeline.executor.records.status import StepRecord, read_manifest, read_record
from simpo_pipeline.executor.run import Action, Live
from simpo_pipeline.executor.step import ExecutorStep, take, this_output_path, versioned
from simpo_pipeline.storage.entry import FileEntry
from simpo_pipeline.storage.files import exists, list_files, read_bytes, read_text, write_bytes
from simpo_pipeline.storage.paths import join

OUTPUTS = {"out.txt": b"1", "sub/rows.txt": b"a row\n"}  # 1 byte and 6 bytes
RIGHT_MANIFEST = [FileEntry("out.txt", 1, "90f599e3"), FileEntry("sub/rows.txt", 6, "c69422e9")]
SOON = LeaseConfig(heartbeat_seconds=0.01, expiry_seconds=0.02, poll_seconds=0.002)
anywhere = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(config: list[Any]):
    for name, data in OUTPUTS.items():
        write_bytes(join(config[0], name), data)


def step(value: Any = 1) -> ExecutorStep:
    return ExecutorStep("step", make, [this_output_path(), versioned(value)])


def place(prefix: str) -> tuple[str, str]:
    """Return a new prefix for one example, and the output path of `step()` in it."""
    own = join(prefix, uuid.uuid4().hex)
    executor = Executor(own)
    executor.run([step()], dry_run=True)
    return own, next(iter(executor.output_paths.values()))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 7),
    st.sampled_from([10**400, -(10**400), 1.0, float("nan"), float("inf"), "1", "SUCCESS", "\ud800", "\x00", "a\nb"]),
    st.text(max_size=3),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
JUNK = st.binary(max_size=40) | st.sampled_from(
    [
        b"[" * 60_000,
        b'{"a":' * 60_000,
        b"9" * 5_000,
        b"NaN",
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        b"{}",
        b"null",
        b"\x00" * 70,
    ]
)
PATHS = st.sampled_from(
    """out.txt sub/rows.txt ../out.txt /etc/hostname ./out.txt sub//rows.txt sub gone gs://bucket/x .executor_status
    manifest.json""".split()
) | st.sampled_from(["", "\ud800", "a\nb", "out.txt\x00"])
RIGHT_ENTRIES = [
    {"path": entry.relative_path, "bytes": entry.num_bytes, "crc32c": entry.crc32c} for entry in RIGHT_MANIFEST
]
ENTRIES = st.one_of(
    st.sampled_from(RIGHT_ENTRIES),
    st.fixed_dictionaries(
        {}, optional={"path": PATHS | SCALARS, "bytes": SCALARS, "crc32c": st.just("90f599e3") | SCALARS}
    ),
    st.builds(lambda entry, size: {**entry, "bytes": size}, st.sampled_from(RIGHT_ENTRIES), SCALARS),
)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def near(right: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    """Return a strategy of JSON objects in which some fields are missing or have another value."""
    fields = {key: st.just(value) | JSON for key, value in right.items()}
    return st.fixed_dictionaries({}, optional=fields).map(encoded)


MANIFESTS = st.one_of(
    JUNK,
    st.lists(ENTRIES, max_size=3).map(lambda files: encoded({"files": files})),
    JSON.map(lambda files: encoded({"files": files})),
    st.just(encoded({"files": RIGHT_ENTRIES})),
)
STATUSES = st.one_of(
    st.sampled_from(
        [b"SUCCESS", b" SUCCESS\n", b"SUCCESS" + b" " * 99, b"success", b"SUCCESS SUCCESS", b"\xa0SUCCESS"]
    ),
    st.sampled_from([b"RUNNING", b"FAILED", b"DEP_FAILED", b"CANCELLED", b'"SUCCESS"', "\u2003SUCCESS".encode()]),
    JUNK,
)
LEASES = JUNK | near(
    {"run_id": "r", "host_name": "h", "pid": 7, "time": "t", "beat": 1, "pid_space": "p", "started": "1"}
)
INFOS = JUNK | near(
    {"name": "step", "version": {"config": {"[1]": 2, "\ud800": {"!step": [1], "use": None}}}, "live_digest": "d"}
)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        ".executor_status": STATUSES,
        ".executor_status.lock": LEASES,
        ".executor_info": INFOS,
        "manifest.json": MANIFESTS,
        "error.json": JUNK | JSON.map(encoded),
    },
)


def put(path: str, files: Mapping[str, bytes]) -> None:
    """Write files without the syncs that make a real write safe but slow."""
    for name, data in files.items():
        if not path.startswith("/"):
            write_bytes(join(path, name), data)
            continue
        Path(path, name).parent.mkdir(parents=True, exist_ok=True)
        Path(path, name).write_bytes(data)


def may_be_believed(path: str, records: Mapping[str, bytes]) -> bool:
    """Return whether the status is SUCCESS and every file in the manifest exists with the listed size."""
    try:
        files = json.loads(records["manifest.json"])["files"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    sizes = {entry.relative_path: entry.num_bytes for entry in list_files(path)}
    token = records.get(".executor_status", b"").decode(errors="replace").strip()
    return token == "SUCCESS" and isinstance(files, list) and all(is_right(entry, sizes) for entry in files)


def is_right(entry: Any, sizes: Mapping[str, int]) -> bool:
    """Return whether a manifest entry has the form that the executor writes, and its file exists with that size."""
    if not isinstance(entry, dict):
        return False
    path, size, checksum = (entry.get(key) for key in ("path", "bytes", "crc32c"))
    return isinstance(path, str) and type(size) is int and isinstance(checksum, str) and sizes.get(path) == size


@settings(anywhere, max_examples=60)
@given(RECORDS)
def test_damaged_records_are_read_planned_and_explained_without_a_crash_and_not_believed(
    prefix: str, records: dict[str, bytes]
):
    prefix, path = place(prefix)
    put(path, {**OUTPUTS, **records})
    record = read_record(path, LeaseWatch(SOON))
    assert record.done <= may_be_believed(path, records)
    for read in (read_manifest, read_info):
        try:
            read(path)
        except SimpoPipelineError as error:
            assert path in str(error)
    executor = Executor(prefix)
    executor.run([step(), step(2)], dry_run=True)
    mine, other = executor.plan
    assert (mine.action is Action.SKIP) == record.done
    assert other.action is Action.RUN
    for explanation in executor.explain("step"):
        assert explanation.text()
        json.dumps(explanation.as_json())
    assert {entry.relative_path for entry in list_files(path)} == {*OUTPUTS, *records}


@settings(anywhere, max_examples=15)
@given(RECORDS)
def test_a_run_on_damaged_records_succeeds_and_writes_a_correct_manifest(prefix: str, records: dict[str, bytes]):
    prefix, path = place(prefix)
    put(path, {**OUTPUTS, **records})
    done = read_record(path, None).done
    executor = Executor(prefix, lease=SOON)
    executor.run([step()])
    assert [result.action for result in executor.results] == ["SKIP" if done else "RUN"]
    assert read_text(join(path, ".executor_status")).strip() == "SUCCESS"
    if not done:
        assert read_manifest(path) == RIGHT_MANIFEST
        assert read_info(path)["output_path"] == path
        assert not exists(join(path, "error.json"))
        assert not exists(join(path, ".executor_status.lock"))
    assert {name: read_bytes(join(path, name)) for name in OUTPUTS} == OUTPUTS


@settings(anywhere, max_examples=40)
@given(st.dictionaries(st.sampled_from([*OUTPUTS, "manifest.json"]), st.binary(max_size=8) | st.none(), min_size=1))
def test_outputs_of_another_size_than_recorded_are_never_believed(prefix: str, changed: dict[str, bytes | None]):
    _, path = place(prefix)
    right = {**OUTPUTS, "manifest.json": encoded({"files": RIGHT_ENTRIES})}
    there = {name: data for name, data in {**right, **changed}.items() if data is not None}
    put(path, {**there, ".executor_status": b"SUCCESS"})
    sizes = {name: len(data) for name, data in there.items()}
    same = there.get("manifest.json") == right["manifest.json"] and all(
        sizes.get(name) == len(data) for name, data in OUTPUTS.items()
    )
    assert read_record(path, None).done == same


def record_with_manifest(prefix: str, files: Any) -> StepRecord:
    _, path = place(prefix)
    put(path, {**OUTPUTS, ".executor_status": b"SUCCESS", "manifest.json": encoded({"files": files})})
    return read_record(path, None)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"bytes": size} for size in (True, 1.0, 1.5, "1", -1, 0, None, float("nan"), float("inf"), 10**400, [1])),
        *({"path": path} for path in ("../out.txt", "/out.txt", "./out.txt", "", "\ud800", None, 3, ["out.txt"])),
        *({"crc32c": checksum} for checksum in (None, 3, ["90f599e3"])),
    ],
    ids=str,
)
def test_a_manifest_with_one_wrong_field_is_not_believed(prefix: str, wrong: dict[str, Any]):
    first, second = RIGHT_ENTRIES
    assert record_with_manifest(prefix, [first, second]).done
    assert not record_with_manifest(prefix, [{**first, **wrong}, second]).done
    assert not record_with_manifest(prefix, [first, second, {**first, **wrong}]).done


@pytest.mark.parametrize("files", [{}, "", None, 0, [[]], [""], {"out.txt": 1}], ids=str)
def test_a_manifest_without_a_list_of_files_is_not_believed(prefix: str, files: Any):
    assert not record_with_manifest(prefix, files).done


def test_a_record_nested_as_deep_as_json_can_be_read_does_not_crash_the_plan(prefix: str):
    prefix, path = place(prefix)
    for depth in range(850, 1000, 5):
        nested = "[" * depth + "]" * depth
        put(path, {".executor_info": f'{{"version": {{"config": {{"[1]": {nested}}}}}}}'.encode()})
        executor = Executor(prefix)
        executor.run([step(2)], dry_run=True)
        assert executor.explain("step")[0].text()


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("manifest.json", {"files": [{"path": "\ud800", "bytes": 1, "crc32c": "90f599e3"}]}),
        (".executor_status.lock", {"run_id": "\ud800", "host_name": "\ud800", "pid": 1, "time": "", "beat": 1}),
        (".executor_info", {"version": {"config": {"[1]": "\ud800", "\ud801": 1}}}),
    ],
)
@pytest.mark.parametrize(
    "flags", [{}, {"json": True}, {"explain": ["step"]}, {"explain": ["step"], "json": True}], ids=str
)
def test_the_contents_of_damaged_records_can_be_printed(
    prefix: str, name: str, record: Any, flags: dict[str, Any], capsys
):
    prefix, path = place(prefix)
    put(path, {**OUTPUTS, ".executor_status": b"SUCCESS", name: encoded(record)})
    executor_main(ExecutorMainConfig(prefix=prefix, dry_run=True, **flags), steps=[step(), step(2)])
    assert "step" in capsys.readouterr().out


def publish(config: list[Any]) -> Live:
    if config[1] is not None and not config[2]:
        raise RuntimeError("the taker fails at first")
    return Live([], digest="d")


@settings(anywhere, max_examples=10)
@given(INFOS)
@example(encoded({"name": "made", "version": {"config": {}}, "live_digest": "\ud800"}))
def test_a_replay_against_any_recorded_info_succeeds_or_fails_cleanly(prefix: str, info: bytes):
    prefix = join(prefix, uuid.uuid4().hex)
    made = ExecutorStep("made", publish, [this_output_path(), None])
    failing = ExecutorStep("taker", publish, [this_output_path(), take(made), False])
    executor = Executor(prefix)
    with pytest.raises(SimpoPipelineError, match="fails at first"):
        executor.run([failing])
    path = executor.output_paths[made]
    put(path, {".executor_info": info})
    try:
        Executor(prefix).run([replace(failing, config=[this_output_path(), take(made), True])])
    except SimpoPipelineError as error:
        assert path in str(error)
    assert read_bytes(join(path, ".executor_info")) == info
    assert read_record(path, None).done
