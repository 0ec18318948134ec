"""The formats of TRL's preference datasets give the same pairs, and nothing in a row is lost in silence."""

import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.messages import Message
from simpo_pipeline.data.pairs import write_pairs
from simpo_pipeline.data.records import PreferenceRecord, parse_record, read_records
from simpo_pipeline.data.tokenize import tokenize_pairs
from simpo_pipeline.errors import DataError, StorageError

SHIPPED = Path(__file__).parents[2] / "experiments" / "data" / "preferences.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()[::32]]
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)


def read(path: Path) -> list[PreferenceRecord]:
    return list(read_records(PreferenceSource(str(path))))


def parse(row: object) -> PreferenceRecord:
    return parse_record(row, default_id="id", where="file, line 1")


def refusal(row: object) -> str:
    with pytest.raises(DataError) as refused:
        parse(row)
    return str(refused.value)


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def explicit(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"prompt": row["chosen"][:1], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}


def in_parts(row: dict[str, Any]) -> dict[str, Any]:
    def parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
        half = len(messages[0]["content"]) // 2
        return [
            {
                "role": each["role"],
                "content": [
                    {"type": "text", "text": text} for text in (each["content"][:half], each["content"][half:])
                ],
            }
            for each in messages
        ]

    return row | {side: parts(row[side]) for side in ("chosen", "rejected")}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_id": row["prompt_id"],
        "prompt": row["chosen"][0]["content"],
        "chosen": row["chosen"][1]["content"],
        "rejected": row["rejected"][1]["content"],
    }


FORMATS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "json": ("a.json", lambda rows: json.dumps(rows).encode()),
    "jsonl-gz": ("a.jsonl.gz", lambda rows: gzip.compress(jsonl(rows))),
    "json-gz": ("a.json.gz", lambda rows: gzip.compress(json.dumps(rows).encode())),
    "parquet": ("a.parquet", parquet),
    "byte-order-mark": ("a.jsonl", lambda rows: b"\xef\xbb\xbf" + jsonl(rows)),
    "carriage-returns": ("a.jsonl", lambda rows: jsonl(rows).replace(b"\n", b"\r\n")),
    "explicit-messages": ("a.jsonl", lambda rows: jsonl([explicit(row) for row in rows])),
    "explicit-messages-parquet": ("a.parquet", lambda rows: parquet([explicit(row) for row in rows])),
    "repeated-messages": ("a.jsonl", lambda rows: jsonl([row | {"prompt": row["chosen"][:1]} for row in rows])),
    "implicit-messages": (
        "a.jsonl",
        lambda rows: jsonl([{name: row[name] for name in ("prompt_id", "chosen", "rejected")} for row in rows]),
    ),
    "content-parts": ("a.jsonl", lambda rows: jsonl([in_parts(row) for row in rows])),
    "content-parts-parquet": ("a.parquet", lambda rows: parquet([in_parts(row) for row in rows])),
    "plain-text": ("a.jsonl", lambda rows: jsonl([plain(row) for row in rows])),
    "plain-text-parquet": ("a.parquet", lambda rows: parquet([plain(row) for row in rows])),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_the_same_pairs_gives_the_same_records(tmp_path: Path, name: str):
    file, content = FORMATS[name]
    (tmp_path / file).write_bytes(content(ROWS))
    found = read(tmp_path / file)
    assert [record.prompt_id for record in found] == [row["prompt_id"] for row in ROWS]
    for side in ("chosen", "rejected"):
        expected = [[(turn["role"], turn["content"]) for turn in row[side]] for row in ROWS]
        assert [[(turn.role, turn.content) for turn in getattr(record, side)] for record in found] == expected


def test_every_format_of_the_same_pairs_gives_the_same_tokenized_pairs(tmp_path: Path, tokenizer: Any):
    def pairs_file(path: Path) -> bytes:
        pairs, _ = tokenize_pairs(read_records(PreferenceSource(str(path))), tokenizer, max_length=10_000)
        with (tmp_path / "pairs.parquet").open("wb") as file:
            write_pairs(file, pairs)
        return (tmp_path / "pairs.parquet").read_bytes()

    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS[:2]))
    expected = pairs_file(tmp_path / "a.jsonl")
    for name, (file, content) in FORMATS.items():
        (tmp_path / file).write_bytes(content(ROWS[:2]))
        assert pairs_file(tmp_path / file) == expected, name


def test_plain_text_is_two_turns_for_the_template_and_a_log_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "a.jsonl").write_bytes(
        jsonl([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ROWS[0]])
    )
    first, _ = read(tmp_path / "a.jsonl")
    assert first.chosen == (Message("user", "The sky is"), Message("assistant", " blue."))
    assert first.rejected == (Message("user", "The sky is"), Message("assistant", " green."))
    assert "1 of 2 records are plain text; each was read as one user turn and one assistant turn" in caplog.text


def test_a_shared_prompt_is_split_off_as_in_trls_documentation():
    record = parse({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert record.chosen == (Message("user", "The sky is"), Message("assistant", " blue."))
    assert record.rejected[-1] == Message("assistant", " green.")
    record = parse(
        {"chosen": "What color is the sky?\nBlue.", "rejected": "What color is the sky?\nGreen.", "prompt": None}
    )
    assert record.chosen == (Message("user", "What color is the sky?\n"), Message("assistant", "Blue."))


@given(prompt=st.text("ab 1.\n天", min_size=1), chosen=st.text("ab 1.天"), rejected=st.text("ab 1.天"))
def test_a_shared_prompt_and_its_answers_are_the_texts_or_are_refused(prompt: str, chosen: str, rejected: str):
    sides = prompt + chosen, prompt + rejected
    try:
        record = parse(dict(zip(("chosen", "rejected"), sides, strict=True)))
    except DataError:
        return
    shared = "".join(
        left for left, _ in itertools.takewhile(lambda pair: len(set(pair)) == 1, zip(*sides, strict=False))
    )
    assert record.prompt[0].content == shared.removesuffix(" ")
    assert [record.prompt[0].content + side[-1].content for side in (record.chosen, record.rejected)] == list(sides)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"chosen": "It is blue.", "rejected": "It is black."}, "first differ inside a word, at character 8"),
        ({"chosen": "It costs 12", "rejected": "It costs 13"}, "first differ inside a word, at character 10"),
        ({"chosen": "Caf e\u0301", "rejected": "Caf e\u0300"}, "first differ inside a word"),
        ({"chosen": "Yes.", "rejected": "No."}, "do not begin with the same prompt; add the field 'prompt'"),
        ({"chosen": " yes", "rejected": " no"}, "do not begin with the same prompt"),
        ({"chosen": "Same.", "rejected": "Same."}, "are equal, or one continues the other"),
        ({"chosen": "The sky", "rejected": "The sky is"}, "are equal, or one continues the other"),
        ({"prompt": "q", "chosen": "q a", "rejected": "q b"}, "both begin with the text of 'prompt'"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "field 'prompt' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": [BAD]}, "field 'chosen' is a string, expected a list"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "write each answer as [{'role': 'assistant'"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, "into the field 'prompt', as a list of messages"),
        ({"prompt": "q", "chosen": json.dumps([USER, GOOD]), "rejected": "b"}, "a list of messages as JSON"),
        (
            {"prompt": json.dumps([USER]), "chosen": "a", "rejected": "b"},
            "field 'prompt' is a string that contains a list",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
            "move all messages before the answer into",
        ),
        (
            {"prompt": [USER], "chosen": [{**USER, "content": "r"}, GOOD], "rejected": [BAD]},
            "field 'chosen' has 2 messages",
        ),
        (
            {"question": "q", "chosen": "It is a", "rejected": "It is b"},
            "field 'question' may be the prompt; rename it",
        ),
        ({"prompt": USER, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "field 'prompt' is an object, expected a"),
        ({"prompt": 3, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "field 'prompt' is a number, expected a list"),
        ({"prompt": json.dumps([USER]), "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "a list of messages as JSON"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "field 'chosen' has 0 messages"),
        (
            {"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
            "an assistant turn before the answer, which may",
        ),
        (
            {"chosen": [USER, BAD, GOOD], "rejected": [USER, BAD, BAD]},
            "'chosen' has an assistant turn before the answer",
        ),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "'rejected' does not end with an assistant turn"),
        ({"prompt": "\ud83d", "chosen": "a", "rejected": "b"}, "field 'prompt' is not valid Unicode at character 0"),
    ],
)
def test_a_row_without_a_single_meaning_is_refused_with_a_conversion(row: dict[str, Any], complaint: str):
    message = refusal(row)
    assert message.startswith("file, line 1: ")
    assert complaint in message


TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("tool_calls", [TOOL_CALL]),
            ("name", "Ada"),
            ("tool_call_id", "7"),
            ("reasoning_content", "hm"),
            ("weight", 0),
        ],
        *[("prefix", False), ("thinking", " "), ("refusal", {"a": None})],
    ],
)
def test_a_key_of_a_message_that_is_not_read_is_refused_unless_it_is_empty(turn: int, key: str, value: Any):
    def row(extra: Any) -> dict[str, Any]:
        chosen = [dict(USER), dict(GOOD)]
        chosen[turn][key] = extra
        return {"chosen": chosen, "rejected": [USER, BAD]}

    assert f"field 'chosen[{turn}].{key}' is" in refusal(row(value))
    for nothing in (None, [], "", {}):
        assert parse(row(nothing)).chosen == (Message("user", "q"), Message("assistant", "a"))


@pytest.mark.parametrize("field", ["system", "tools", "images", "chat_template_kwargs"])
def test_a_field_that_others_add_to_the_conversation_is_refused_unless_it_is_empty(tmp_path: Path, field: str):
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert f"field '{field}' is a list, and would be part of what a model reads" in refusal(row | {field: ["x"]})
    assert parse(row | {field: None}) == parse(row | {field: []}) == parse(row | {"score": 3})
    (tmp_path / "a.parquet").write_bytes(parquet([row | {field: None}, row | {field: ["x"]}]))
    with pytest.raises(DataError, match=rf"a\.parquet, row 2: field '{field}'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([{"type": "image"}], "field 'chosen[1].content[0].type' is 'image', expected 'text'"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}], "content[1].type' is 'image_url'"),
        ([{"type": "text"}], "field 'chosen[1].content[0].text' is null, expected a string"),
        (
            [{"type": "text", "text": "a", "cache": 1}],
            "field 'chosen[1].content[0].cache' is a number, which is not read",
        ),
        (["a"], "field 'chosen[1].content[0]' is a string, expected {'type': 'text'"),
        ([], "field 'chosen[1].content' is an empty list, expected a string or a list of parts"),
        (None, "field 'chosen[1].content' is null, expected a string or a list of parts"),
        ({"text": "a"}, "field 'chosen[1].content' is an object, expected a string or a list of parts"),
        ([{"type": "text", "text": "\ud83d"}], "field 'chosen[1].content[0].text' is not valid Unicode"),
    ],
)
def test_content_that_is_not_text_is_refused(content: Any, complaint: str):
    assert complaint in refusal({"chosen": [USER, {"role": "assistant", "content": content}], "rejected": [USER, BAD]})


def test_a_system_turn_may_be_part_of_an_explicit_prompt():
    system = {"role": "system", "content": "Be brief."}
    record = parse({"prompt": [system, USER], "chosen": [GOOD], "rejected": [BAD]})
    assert record.prompt == (Message("system", "Be brief."), Message("user", "q"))


@pytest.mark.parametrize(("value", "name"), [(0, "0"), (7, "7"), (-1, "-1"), ("7", "7"), ("", "id"), (None, "id")])
def test_an_integer_prompt_id_is_read_as_text(value: Any, name: str):
    assert parse({"prompt_id": value, "chosen": [USER, GOOD], "rejected": [USER, BAD]}).prompt_id == name


GOOD_LINE = json.dumps({"chosen": [USER, GOOD], "rejected": [USER, BAD]}).encode()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl.gz", GOOD_LINE, r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE * 99)[:-9], r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.json", b"[" + GOOD_LINE, r"a\.json: not JSON \(.*\), expected a list of objects"),
        ("a.json", GOOD_LINE + b"\n" + GOOD_LINE, r"a\.json: not JSON \(Extra data.*ends in \.jsonl"),
        ("a.json", GOOD_LINE, r"a\.json: the file contains an object, expected a list; write its rows as one list"),
        ("a.json", b'{"data": [' + GOOD_LINE + b"]}", r"a\.json: the file contains an object, expected a list"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE) + b"garbage", r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl", gzip.compress(GOOD_LINE), r"a\.jsonl, line 1: the content is compressed; let the name"),
        ("a.jsonl", GOOD_LINE.decode().encode("utf-16"), r"a\.jsonl, line 1: byte 0 is not UTF-8"),
        ("a.jsonl", b'{"score": NaN}', r"a\.jsonl, line 1: the value NaN is not JSON"),
        ("a.json", b'[{"a": [-Infinity]}]', r"a\.json: the value -Infinity is not JSON"),
        ("a.json", b"[" + GOOD_LINE + b", 3]", r"a\.json, row 2: got a number, expected an object"),
        ("a.json", b"[]", r"a\.json: the dataset is empty"),
        ("a.jsonl", b'{"chosen": [], "chosen": []}', r"a\.jsonl, line 1: an object has the key 'chosen' twice"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: lists or objects are nested too deeply"),
        ("a.jsonl", b'{"score": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 1: a number is too long"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, content: bytes, complaint: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read(tmp_path / name)


def write(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl([{"prompt_id": name, "chosen": [USER, GOOD], "rejected": [USER, BAD]}]))


@pytest.mark.parametrize(
    "name", ["run[1]/p.jsonl", "p[1].jsonl", "p*.jsonl", "p?.jsonl", "[ab]/[cd]/*.jsonl", "[.jsonl"]
)
def test_a_path_that_exists_is_that_path_even_with_pattern_characters(tmp_path: Path, name: str):
    for other in ("run1/p.jsonl", "p1.jsonl", "pq.jsonl", "a/c/x.jsonl", "[ab]/c/x.jsonl", "[ab]/[cd]/x.jsonl"):
        write(tmp_path / other, "other")
    write(tmp_path / name, "literal")
    assert [record.prompt_id for record in read(tmp_path / name)] == ["literal"]


def test_a_folder_that_exists_is_that_folder_and_no_other_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "run1" / "a.jsonl", "other")
    assert [record.prompt_id for record in read(tmp_path / "run[1]" / "*.jsonl")] == ["other"]
    write(tmp_path / "run[1]" / "sub" / "a.jsonl", "literal")
    assert [record.prompt_id for record in read(tmp_path / "run[1]" / "sub" / "[a].jsonl")] == ["literal"]
    for missing in ("run[1]/a.jsonl", "run[1]/*.jsonl"):
        with pytest.raises(DataError, match="no file matches"):
            read(tmp_path / missing)
    monkeypatch.chdir(tmp_path)
    assert [record.prompt_id for record in read(Path("run[1]/*/a.jsonl"))] == ["literal"]


def test_a_pattern_reads_through_links_and_leaves_out_nothing_that_is_named_like_its_files(tmp_path: Path):
    write(tmp_path / "elsewhere" / "a.jsonl", "linked")
    write(tmp_path / "runs" / "1" / "a.jsonl", "plain")
    (tmp_path / "runs" / "2").symlink_to("../elsewhere")
    (tmp_path / "runs" / "notes.md").touch()
    (tmp_path / "runs" / "1" / "a.folder").mkdir()
    pattern = tmp_path / "runs" / "*" / "a.*"
    assert [record.prompt_id for record in read(pattern)] == ["plain", "linked"]
    other = tmp_path / "runs" / "1" / "a.json"
    makers: tuple[Callable[[Path], None], ...] = (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"))
    for number, make in enumerate(makers):
        make(other)
        with pytest.raises(StorageError, match=r"Cannot read '.*/runs/1/a\.json'"):
            read(pattern)
        other.rename(tmp_path / f"moved-{number}")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "\ud83d"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    row=json_values
    | st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "prompt_id", "system"), json_values)
    )
)
def test_any_row_is_a_record_or_a_data_error(row: Any):
    try:
        record = parse(row)
    except DataError as error:
        assert str(error).encode() and "\n" not in str(error)
    else:
        assert record.chosen[:-1] == record.rejected[:-1] and record.prompt
