"""Records from files of every kind, patterns, remote folders and the hub; every malformed row is named."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.records import Message, PreferenceRecord, read_records
from simpo_pipeline.errors import ConfigError, DataError, StorageError


def messages(*turns: str) -> list[dict[str, str]]:
    """Return alternating turns of user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def row(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "2+2?",
        "prompt_id": "sum",
        "chosen": messages("2+2?", "4"),
        "rejected": messages("2+2?", "5"),
    } | changes


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in row().items() if name != field}


def write_jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(path)


def parquet_bytes(*rows: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


SOUND_PARQUET = parquet_bytes(row(), row())


def read(path: object, split: str | None = None, revision: str | None = None) -> list[PreferenceRecord]:
    return list(read_records(PreferenceSource(str(path), split, revision)))


def test_a_jsonl_row_becomes_a_record(tmp_path: Path):
    [record] = read(write_jsonl(tmp_path / "a.jsonl", row(extra=1)))
    assert record.prompt_id == "sum"
    assert record.prompt == (Message("user", "2+2?"),)
    assert record.chosen[-1] == Message("assistant", "4")
    assert record.rejected[-1] == Message("assistant", "5")


def test_parquet_and_jsonl_give_the_same_records(tmp_path: Path):
    rows = [row(prompt_id=str(i), chosen=messages("q", f"answer {i}"), rejected=messages("q", "no")) for i in range(5)]
    write_jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(*rows))
    left, right = read(tmp_path / "a.jsonl"), read(tmp_path / "a.parquet")
    assert [(r.prompt_id, r.chosen, r.rejected) for r in left] == [(r.prompt_id, r.chosen, r.rejected) for r in right]
    assert right[4].where.endswith("a.parquet, row 5")


def test_a_row_without_prompt_id_is_named_after_its_file_and_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(without("prompt_id")) + "\n")
    [record] = read(path)
    assert record.prompt_id == "a.jsonl:2"


def test_a_glob_reads_all_matching_files_in_order_of_name(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "skip.jsonl.bak"):
        write_jsonl(tmp_path / name, row(prompt_id=name))
    (tmp_path / "deeper").mkdir()
    write_jsonl(tmp_path / "deeper" / "c.jsonl", row(prompt_id="deeper"))
    assert [record.prompt_id for record in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [record.prompt_id for record in read(tmp_path / "*" / "[cd].jsonl")] == ["deeper"]


def test_a_relative_glob_starts_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_jsonl(tmp_path / "a.jsonl", row())
    monkeypatch.chdir(tmp_path)
    assert [record.prompt_id for record in read("a*.jsonl")] == ["sum"]


def test_a_glob_works_at_any_fsspec_url():
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/globbed/one.jsonl", json.dumps(row(prompt_id="one")).encode())
    remote.pipe_file("/globbed/two.parquet", parquet_bytes(row(prompt_id="two")))
    assert [record.prompt_id for record in read("memory://globbed/*")] == ["one", "two"]


def test_a_hub_dataset_is_read_from_the_parquet_files_of_its_split(fake_hub: Callable[..., list[str]]):
    requests = fake_hub(
        {
            "README.md": b"words",
            "data/test_prefs-00000-of-00001.parquet": parquet_bytes(row(prompt_id="test")),
            "data/train_prefs-00001-of-00002.parquet": parquet_bytes(row(prompt_id="second")),
            "data/train_prefs-00000-of-00002.parquet": parquet_bytes(row(prompt_id="first")),
        }
    )
    records = read("owner/name", split="train_prefs", revision="3949bf5")
    assert [record.prompt_id for record in records] == ["first", "second"]
    assert records[0].where == "hf://datasets/owner/name@3949bf5/data/train_prefs-00000-of-00002.parquet, row 1"
    assert all("3949bf5" in path for path in requests), requests


def test_a_hub_dataset_is_read_from_the_hubs_own_parquet_copy(fake_hub: Callable[..., list[str]]):
    fake_hub({"default/train/0000.parquet": parquet_bytes(row())})
    assert [record.prompt_id for record in read("owner/name", "train", "refs/convert/parquet")] == ["sum"]


def test_an_unknown_split_of_a_hub_dataset_says_where_to_look(fake_hub: Callable[..., list[str]]):
    fake_hub({"data/train-00000-of-00001.parquet": parquet_bytes(row())})
    with pytest.raises(DataError, match=r"no Parquet file of split 'valid' .* 'refs/convert/parquet'"):
        read("owner/name", split="valid")


def test_a_split_in_several_configurations_is_not_mixed(fake_hub: Callable[..., list[str]]):
    fake_hub({"en/train-0.parquet": parquet_bytes(row()), "de/train-0.parquet": parquet_bytes(row())})
    with pytest.raises(DataError, match="several configurations: de, en; choose one"):
        read("owner/name", split="train")


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (without("rejected"), "field 'rejected' is missing"),
        (row(chosen="4"), "field 'chosen' is a string, expected a list"),
        (row(chosen=None), "field 'chosen' is null, expected a list"),
        (row(prompt_id=7.0), "field 'prompt_id' is a number, expected a string or an integer"),
        (row(prompt_id=True), "field 'prompt_id' is a boolean, expected a string or an integer"),
        (row(chosen=["2+2?", "4"]), r"field 'chosen\[0\]' is a string, expected an object"),
        (row(chosen=[{"role": "user"}]), r"field 'chosen\[0\].content' is missing"),
        (row(chosen=[{"role": 1, "content": "q"}]), r"field 'chosen\[0\].role' is a number, expected a string"),
        (row(chosen=messages("q")), "field 'chosen' has 1 messages, expected a prompt and an answer"),
        (row(rejected=messages("2+2?", "5", "why?")), "field 'rejected' does not end with an assistant turn"),
        (row(rejected=messages("2+3?", "5")), r"a different prompt than 'chosen' \(message 0: user: '2\+2\?' against"),
        (row(rejected=messages("a", "b", "c", "d")), "a different prompt than 'chosen'"),
        (row(chosen=messages("2+2?", "4 \ud83d")), r"field 'chosen\[1\]\.content' is not valid Unicode at character 2"),
        (row(prompt_id="p\ud83d"), r"field 'prompt_id' is not valid Unicode at character 1"),
        (row(chosen=[{"role": "\ud83d", "content": "q"}]), r"field 'chosen\[0\]\.role' is not valid Unicode"),
        ([1, 2], "got a list, expected an object"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path: Path, bad: object, complaint: str):
    path = write_jsonl(tmp_path / "bad.jsonl", row(), bad)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: .*{complaint}"):
        read(path)


def test_a_malformed_parquet_row_is_named_by_file_row_and_field(tmp_path: Path):
    (tmp_path / "bad.parquet").write_bytes(parquet_bytes(row(), row(rejected=messages("2+2?"))))
    with pytest.raises(DataError, match=r"bad\.parquet, row 2: field 'rejected' has 1 messages"):
        read(tmp_path / "bad.parquet")


def test_a_missing_parquet_column_is_named(tmp_path: Path):
    (tmp_path / "bad.parquet").write_bytes(parquet_bytes(without("chosen")))
    with pytest.raises(DataError, match=r"bad\.parquet, row 1: field 'chosen' is missing"):
        read(tmp_path / "bad.parquet")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl, line 2: byte 15 is not UTF-8"):
        read(path)


def test_a_parquet_text_that_is_not_utf8_is_named(tmp_path: Path):
    texts = [[{"role": "user", "content": text}, {"role": "assistant", "content": b"a"}] for text in (b"ok", b"\xe9")]
    binary = pa.array(texts, pa.list_(pa.struct([("role", pa.string()), ("content", pa.binary())])))
    as_text = binary.cast(pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), safe=False)
    pq.write_table(pa.table({"chosen": as_text, "rejected": as_text}), tmp_path / "latin.parquet")
    with pytest.raises(DataError, match=r"latin\.parquet, row 2: a text field is not UTF-8"):
        read(tmp_path / "latin.parquet")


def test_a_line_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: not JSON"):
        read(tmp_path / "bad.jsonl")


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path):
    (tmp_path / "bad.parquet").write_text("words")
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        read(tmp_path / "bad.parquet")


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SIDES = [pa.array([messages("q", text)] * 2, MESSAGES) for text in ("a", "b")]


@pytest.mark.parametrize(
    ("names", "columns", "complaint"),
    [
        (["chosen", "rejected", "chosen"], [*SIDES, SIDES[0]], "the file has the column 'chosen' twice"),
        (["Chosen", "Rejected"], SIDES, "the file has 'Chosen', 'Rejected', none of which is read"),
        (
            ["chosen", "rejected", "prompt_id"],
            [*SIDES, pa.array([1000, 1], pa.timestamp("ns"))],
            "row 2: a value cannot be read",
        ),
        (
            ["chosen", "rejected", "system"],
            [*SIDES, pa.array([0, 10**18], pa.date64())],
            r"row 2: a value cannot be read \(days",
        ),
        (
            ["chosen", "rejected"],
            [
                pa.ListArray.from_arrays(
                    [0, 1], pa.StructArray.from_arrays([pa.array(["q"])] * 3, ["role", "content", "content"])
                ),
                SIDES[1][:1],
            ],
            "row 1: a value cannot be read .*duplicate field names",
        ),
    ],
)
def test_parquet_columns_that_cannot_be_taken_as_they_are_are_refused(
    tmp_path: Path, names: list[str], columns: list[Any], complaint: str
):
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet(, |: ){complaint}"):
        read(tmp_path / "a.parquet")


@settings(max_examples=30)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
@example([(SOUND_PARQUET.rindex(b"rejected"), 0xFF)])
def test_a_damaged_parquet_file_is_read_or_refused(changes: list[tuple[int, int]]):
    damaged = bytearray(SOUND_PARQUET)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    fsspec.filesystem("memory").pipe_file("/damaged.parquet", bytes(damaged))
    try:
        read("memory://damaged.parquet")
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.parquet"])
def test_an_empty_data_set_is_an_error(tmp_path: Path, name: str):
    schema = pa.schema([("chosen", pa.list_(pa.string())), ("rejected", pa.list_(pa.string()))])
    if name.endswith("parquet"):
        pq.write_table(schema.empty_table(), tmp_path / name)
    else:
        (tmp_path / name).write_text("\n")
    with pytest.raises(DataError, match=f"{name}: the dataset is empty"):
        read(tmp_path / name)


def test_an_unsupported_file_type_is_refused_naming_the_supported_ones():
    with pytest.raises(DataError, match=r"pairs\.csv: expected a file ending in \.jsonl, .*\.json\.gz or \.parquet"):
        read("/data/pairs.csv")


def test_a_hub_id_without_its_split_says_that_split_is_missing():
    with pytest.raises(DataError, match="for a hub dataset, also give its split"):
        read("HuggingFaceH4/ultrafeedback_binarized")


def test_a_pattern_without_a_match_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_what_is_no_file_is_refused_without_reading_it(tmp_path: Path, name: str):
    os.mkfifo(tmp_path / name)  # reading it would never end, nor would reading the device
    with pytest.raises(StorageError, match=r"it is a pipe or a device\. Give the path of a file"):
        read(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(StorageError, match="it is a pipe or a device"):
        read(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises(StorageError, match="symbolic links"):
        read(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match="it is a folder"):
        read(tmp_path / name)


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(StorageError, match=r"absent\.jsonl"):
        read(tmp_path / "absent.jsonl")


def test_a_path_with_a_split_must_be_a_hub_id():
    with pytest.raises(DataError, match="expected a hub dataset id like owner/name"):
        read("/data/pairs.jsonl", split="train")


def test_a_revision_without_split_is_refused():
    with pytest.raises(ConfigError, match="revision 'main' is given without split"):
        PreferenceSource("data.jsonl", revision="main")
