"""Prompts come from one source, exactly as they are, and hosts shard them without gaps or overlap."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simpo_pipeline.data.messages import Message
from simpo_pipeline.data.prompts import ChatPrompt, PromptsConfig, TokenPrompt, load_prompts, prompt_shard
from simpo_pipeline.errors import ConfigError, DataError, SimpoPipelineError, StorageError


def test_prompts_are_taken_as_given():
    config = PromptsConfig(prompts=("a", "b"))
    assert load_prompts(config) == ("a", "b")
    assert config.count == 2


def test_synthetic_prompts_contain_their_index():
    config = PromptsConfig(synthetic_prompt_count=2, synthetic_prompt_template="M11 prompt {index}: explain {{x}}.")
    assert config.count == 2
    assert load_prompts(config) == ("M11 prompt 0: explain {x}.", "M11 prompt 1: explain {x}.")


def test_a_file_has_one_prompt_per_line_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n \t\ntwo\n")
    config = PromptsConfig(prompts_path=str(tmp_path / "prompts.txt"))
    assert load_prompts(config) == ("one", "two")
    assert config.count is None


def test_a_missing_file_and_an_empty_one_are_named(tmp_path):
    with pytest.raises(DataError, match=r"prompts_path does not exist: .*nowhere\.txt"):
        load_prompts(PromptsConfig(prompts_path=str(tmp_path / "nowhere.txt")))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"contains no non-empty prompts: .*blank\.txt"):
        load_prompts(PromptsConfig(prompts_path=str(tmp_path / "blank.txt")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of"),
        ({"prompts": ("a",), "synthetic_prompt_count": 2}, "exactly one of"),
        ({"synthetic_prompt_count": 1, "synthetic_prompt_template": " "}, "synthetic_prompt_template is empty"),
        ({"synthetic_prompt_count": 1, "synthetic_prompt_template": "{index:>99999999999999}"}, r"cannot be filled"),
        ({"synthetic_prompt_count": 0}, "synthetic_prompt_count must be positive, got 0"),
        ({"prompts": ("a", " ")}, r"prompts\[1\] is empty"),
        ({"synthetic_prompt_count": 1, "synthetic_prompt_template": "{number}"}, r"only field is \{index\}"),
        ({"synthetic_prompt_count": 1, "synthetic_prompt_template": "{index.a}"}, r"only field is \{index\}"),
        ({"synthetic_prompt_count": 1, "synthetic_prompt_template": "{index[0]}"}, r"only field is \{index\}"),
    ],
)
def test_a_wrong_config_is_refused_saying_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        PromptsConfig(**fields)


@given(num_prompts=st.integers(0, 300), process_count=st.integers(1, 16))
def test_shards_are_contiguous_and_cover_everything_once(num_prompts, process_count):
    shards = [prompt_shard(num_prompts, index, process_count) for index in range(process_count)]
    assert [index for shard in shards for index in shard] == list(range(num_prompts))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_process_outside_the_job_has_no_shard():
    with pytest.raises(ConfigError, match="process_index=4 out of range for process_count=4"):
        prompt_shard(8, 4, 4)
    with pytest.raises(ConfigError, match="process_count must be positive, got 0"):
        prompt_shard(8, 0, 0)


def prompts_of(path: Path) -> tuple[Any, ...]:
    return load_prompts(PromptsConfig(prompts_path=str(path)))


line_text = st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs"]), min_size=1)


@given(
    lines=st.lists(line_text.filter(str.strip), min_size=1), ending=st.sampled_from(["\n", "\r\n"]), mark=st.booleans()
)
def test_a_line_of_a_text_file_is_its_prompt_unchanged(lines, ending, mark):
    assume(not lines[0].startswith("\ufeff"))
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/prompts.txt", ("\ufeff" * mark + ending.join(lines)).encode())
    assert load_prompts(PromptsConfig(prompts_path="memory://prompts.txt")) == tuple(lines)


def test_only_line_feeds_end_a_line_and_one_byte_order_mark_is_removed(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff\ufeffa\u2028b\x85c\x0bd\x0ce\x1cf\rg\r\n\t\n    indented \r\nlast\r".encode())
    assert prompts_of(path) == ("\ufeffa\u2028b\x85c\x0bd\x0ce\x1cf\rg", "    indented ", "last\r")


def test_half_of_a_surrogate_pair_in_the_settings_is_refused():
    with pytest.raises(DataError, match=r"field 'prompts\[1\]' is not valid Unicode at character 0"):
        PromptsConfig(prompts=("a", "\udc80"))
    with pytest.raises(DataError, match="field 'synthetic_prompt_template' is not valid Unicode"):
        PromptsConfig(synthetic_prompt_count=1, synthetic_prompt_template="\ud83d{index}")


@pytest.mark.parametrize("name", ["p.txt", "p.JSONL", "p.ndjson", "p"])
@pytest.mark.parametrize("row", [{"prompt": "q"}, {"messages": []}, {"prompt_token_ids": [1], "id": 2}])
def test_a_row_of_json_is_not_the_text_of_a_prompt(tmp_path: Path, name: str, row: dict[str, Any]):
    (tmp_path / name).write_text('{x}\n{"a": 1}\n' + json.dumps(row))
    with pytest.raises(
        DataError, match=rf"{name}, line 3: the line is a JSON object with a prompt; let the file's name"
    ):
        prompts_of(tmp_path / name)


@pytest.mark.parametrize("data", ["fine\ncafé".encode("latin-1"), b"fine\n" + gzip.compress(b"one")])
def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path, data: bytes):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(StorageError, match=r"p\.txt': line 2 is not UTF-8\. Save the file as UTF-8 text"):
        prompts_of(tmp_path / "p.txt")


ROWS = [
    ({"prompt": "  two\nlines\u2028 "}, "  two\nlines\u2028 "),
    (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}], "id": 3},
        ChatPrompt((Message("system", "Be brief."), Message("user", "q"))),
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]}]},
        ChatPrompt((Message("user", "q?"),)),
    ),
    ({"prompt_token_ids": [0, 5, 5]}, TokenPrompt((0, 5, 5))),
    ({"prompt": "one", "messages": None, "prompt_token_ids": None}, "one"),
]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json", "prompts.jsonl.gz"])
def test_a_row_is_a_text_a_conversation_or_token_ids(tmp_path: Path, name: str):
    rows = [row for row, _ in ROWS]
    lines = json.dumps(rows) if name.endswith(".json") else "\n\n".join(map(json.dumps, rows))
    data = ("\ufeff" + lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert prompts_of(tmp_path / name) == tuple(prompt for _, prompt in ROWS)


def test_parquet_rows_are_prompts_too(tmp_path: Path):
    pq.write_table(pa.table({"prompt": ["a", " b"], "score": [1, 2]}), tmp_path / "prompts.parquet")
    assert prompts_of(tmp_path / "prompts.parquet") == ("a", " b")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("text", r"got a string, expected an object like \{'prompt': '...'\}"),
        ({"text": "q"}, "expected exactly one of the fields .*, got none of them"),
        ({"prompt": "q", "messages": []}, "got 'prompt' and 'messages'; keep the one"),
        ({"prompt": " \n"}, "field 'prompt' is empty"),
        ({"prompt": 3}, "field 'prompt' is a number, expected a list"),
        ({"prompt": '[{"role": "user", "content": "q"}]'}, "a string that contains a list of messages as JSON"),
        ({"prompt": "\ud83d"}, "not valid Unicode at character 0"),
        ({"prompt_token_ids": ["x" * 999]}, r"field 'prompt_token_ids' contains 'x{39}, expected"),
        ({"prompt": "q", "continue_final_message": True}, "field 'continue_final_message' is a boolean, and would be"),
        ({"prompt": "q", "system": "Be brief."}, "field 'system' is a string, and would be part"),
        ({"messages": []}, "field 'messages' has no messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "field 'messages' ends with an assistant turn"),
        ({"messages": [{"role": "user", "content": "q", "name": "Ada"}]}, r"'messages\[0\].name' is a string"),
        ({"prompt_token_ids": []}, "field 'prompt_token_ids' is empty"),
        ({"prompt_token_ids": "1 2"}, "field 'prompt_token_ids' is a string"),
        ({"prompt_token_ids": [1, -1]}, "field 'prompt_token_ids' contains -1"),
        ({"prompt_token_ids": [True]}, "field 'prompt_token_ids' contains True"),
        ({"prompt_token_ids": [1.0]}, r"field 'prompt_token_ids' contains 1\.0"),
    ],
)
def test_a_row_that_is_no_prompt_is_named_by_file_and_line(tmp_path: Path, row: Any, complaint: str):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"p\.jsonl, line 2: .*{complaint}"):
        prompts_of(tmp_path / "p.jsonl")


@settings(max_examples=40)
@given(data=st.binary(max_size=60), name=st.sampled_from(["p.txt", "p.jsonl", "p.json", "p.jsonl.gz", "p.parquet"]))
def test_any_bytes_are_prompts_or_one_of_our_errors(data: bytes, name: str):
    fsspec.filesystem("memory").pipe_file(f"/{name}", data)
    with contextlib.suppress(SimpoPipelineError):
        assert load_prompts(PromptsConfig(prompts_path=f"memory://{name}"))
