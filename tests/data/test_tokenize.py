"""Records to pairs: policies for pairs that are too long or unusable, and their counts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo_pipeline.data.config import ChatConfig
from simpo_pipeline.data.messages import Message
from simpo_pipeline.data.pairs import TokenizedPair, read_pairs, write_pairs
from simpo_pipeline.data.records import PreferenceRecord
from simpo_pipeline.data.tokenize import tokenize_pairs
from simpo_pipeline.errors import ConfigError, DataError
from simpo_pipeline.storage.files import open_write

PROMPT_TOKENS = len("<user\nHi>\n<assistant\n")  # one token per character; < and > stand for the two turn tokens


def record(chosen: str, rejected: str, question: str = "Hi", prompt_id: str = "p") -> PreferenceRecord:
    prompt = Message("user", question)
    return PreferenceRecord(
        prompt_id=prompt_id,
        chosen=(prompt, Message("assistant", chosen)),
        rejected=(prompt, Message("assistant", rejected)),
        where="pairs.jsonl, line 3",
    )


def answers(pair: TokenizedPair, tokenizer: Any) -> tuple[str, str]:
    return (
        tokenizer.decode(pair.chosen_tokens[pair.chosen_response_start :].tolist()),
        tokenizer.decode(pair.rejected_tokens[pair.rejected_response_start :].tolist()),
    )


def test_pairs_contain_prompt_and_answer_and_the_start_of_the_answer(tokenizer: Any):
    [pair], stats = tokenize_pairs([record("Hello.", "What?")], tokenizer, max_length=40)
    assert pair.chosen_response_start == pair.rejected_response_start == PROMPT_TOKENS
    assert answers(pair, tokenizer) == ("Hello.<|im_end|>", "What?<|im_end|>")
    assert dataclasses.asdict(stats) == {
        "num_records": 1,
        "num_pairs": 1,
        "num_dropped_too_long": 0,
        "num_dropped_unusable": 0,
        "num_truncated": 0,
        "prompt_tokens": 2 * PROMPT_TOKENS,
        "chosen_response_tokens": 7,
        "rejected_response_tokens": 6,
        "longest": PROMPT_TOKENS + 7,
        "max_length": 40,
        "num_special_text": 0,
        "num_omitted_text": 0,
        "num_trimmed_text": 0,
        "num_unencodable_text": 0,
        "num_merged_border": 0,
        "padding_share": pytest.approx(1 - (2 * PROMPT_TOKENS + 13) / 80),
    }


def test_a_pair_of_exactly_the_maximum_is_kept_whole(tokenizer: Any):
    [pair], stats = tokenize_pairs([record("Hello.", "What?")], tokenizer, max_length=PROMPT_TOKENS + 7)
    assert answers(pair, tokenizer)[0] == "Hello.<|im_end|>"
    assert stats.num_truncated == 0


def test_a_pair_that_is_too_long_is_an_error_that_names_the_remedies(tokenizer: Any):
    with pytest.raises(
        DataError, match=r"pairs\.jsonl, line 3: the pair 'p' has 28 tokens, more than max_length 27; .*'truncate'"
    ):
        tokenize_pairs([record("Hello.", "What?")], tokenizer, max_length=27)


def test_drop_removes_pairs_that_are_too_long_and_counts_them(tokenizer: Any):
    records = [record("Hello.", "What?", prompt_id="long"), record("Yo", "Eh", prompt_id="short")]
    pairs, stats = tokenize_pairs(records, tokenizer, max_length=PROMPT_TOKENS + 3, too_long="drop")
    assert [pair.prompt_id for pair in pairs] == ["short"]
    assert (stats.num_records, stats.num_pairs, stats.num_dropped, stats.num_dropped_too_long) == (2, 1, 1, 1)


def test_truncate_keeps_the_prompt_and_cuts_the_tails_of_the_answers(tokenizer: Any):
    [pair], stats = tokenize_pairs(
        [record("Hello.", "Eh")], tokenizer, max_length=PROMPT_TOKENS + 4, too_long="truncate"
    )
    assert answers(pair, tokenizer) == ("Hell", "Eh<|im_end|>")
    assert (stats.num_truncated, stats.num_dropped) == (1, 0)


@pytest.mark.parametrize(
    "hopeless", [record("Yo", "Eh", question="Hello, hello, hello"), record("Same start, left", "Same start, right")]
)
def test_truncate_drops_a_pair_that_has_no_preference_left(tokenizer: Any, hopeless: PreferenceRecord):
    records = [hopeless, record("Yo", "Eh", prompt_id="fits")]
    pairs, stats = tokenize_pairs(records, tokenizer, max_length=PROMPT_TOKENS + 4, too_long="truncate")
    assert [pair.prompt_id for pair in pairs] == ["fits"]
    assert (stats.num_truncated, stats.num_dropped_too_long) == (0, 1)


UNUSABLE = [
    (record(" \n", "Eh"), r"field 'chosen\[1\]\.content' is an empty answer"),
    (record("Eh", ""), r"field 'rejected\[1\]\.content' is an empty answer"),
    (record("Eh", "Eh"), "have the same answer"),
]


@pytest.mark.parametrize(("bad", "complaint"), UNUSABLE)
def test_a_pair_without_preference_is_an_error(tokenizer: Any, bad: PreferenceRecord, complaint: str):
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 3: .*{complaint}.* set unusable to 'drop'"):
        tokenize_pairs([bad], tokenizer, max_length=64)


def test_answers_that_the_template_makes_equal_are_no_preference(tokenizer: Any):
    template = tokenizer.chat_template.replace("['content']", "['content'] | trim")
    trimming = dataclasses.replace(tokenizer, chat_template=template)
    assert trimming.chat_template != tokenizer.chat_template
    records = [record("Yes", "Yes\n", prompt_id="equal"), record("Yes", "No", prompt_id="good")]
    with pytest.raises(
        DataError,
        match=r"line 3: the chat template renders 'chosen' and 'rejected' to equal tokens.* set unusable to 'drop'",
    ):
        tokenize_pairs(records, trimming, max_length=64)
    pairs, stats = tokenize_pairs(records, trimming, max_length=64, unusable="drop")
    assert [pair.prompt_id for pair in pairs] == ["good"]
    assert stats.num_dropped_unusable == 1
    _, stats = tokenize_pairs([record("Yes\n", "No"), records[1]], trimming, max_length=64)
    assert (stats.num_trimmed_text, stats.num_omitted_text) == (1, 0)
    assert len(tokenize_pairs(records, tokenizer, max_length=64)[0]) == 2


def test_pairs_without_preference_can_be_dropped_and_are_counted(tokenizer: Any):
    records = [bad for bad, _ in UNUSABLE] + [record("Yo", "Eh", prompt_id="good")]
    pairs, stats = tokenize_pairs(records, tokenizer, max_length=64, unusable="drop")
    assert [pair.prompt_id for pair in pairs] == ["good"]
    assert (stats.num_records, stats.num_dropped_unusable, stats.num_dropped) == (4, 3, 3)


def test_no_pair_left_is_an_error_with_the_counts_of_dropped_pairs(tokenizer: Any):
    records = [record("Hello.", "What?"), record("Eh", "Eh")]
    with pytest.raises(DataError, match="none of 2 pairs is left: 1 longer than max_length 20, 1 without a preference"):
        tokenize_pairs(records, tokenizer, max_length=20, too_long="drop", unusable="drop")


def test_an_unsuitable_template_is_reported_with_the_row(tokenizer: Any):
    tokenizer = dataclasses.replace(tokenizer, chat_template="{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 3: the chat template of .* rejects .*never"):
        tokenize_pairs([record("Yo", "Eh")], tokenizer, max_length=64)


def test_what_the_model_reads_otherwise_than_written_is_counted_by_pair(tokenizer: Any):
    template = tokenizer.chat_template.replace("message['content']", "message['content'].split('</think>')[-1]")
    removing = dataclasses.replace(tokenizer, chat_template=template)
    records = [
        record("<think>hm</think>Yo", "<think>so</think>Eh"),
        record("Yo", "Eh", question="Is <|im_end|> it?"),
        record("Yo", "Eh"),
    ]
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 3: the chat template of .* does not print message 1"):
        tokenize_pairs(records, removing, max_length=64)
    config = ChatConfig(special_text="parse", omitted_text="count")
    pairs, stats = tokenize_pairs(records, removing, max_length=64, chat_config=config)
    assert [answers(pair, removing) for pair in pairs] == [("Yo<|im_end|>", "Eh<|im_end|>")] * 3
    assert (stats.num_special_text, stats.num_omitted_text, stats.num_unencodable_text) == (1, 1, 0)


def test_a_maximum_without_room_for_two_tokens_is_refused(tokenizer: Any):
    with pytest.raises(ConfigError, match="max_length is 1"):
        tokenize_pairs([record("Yo", "Eh")], tokenizer, max_length=1)


@pytest.mark.parametrize("folder", ["", "memory://written/"])
def test_pairs_survive_a_round_trip_through_parquet(tokenizer: Any, tmp_path: Path, folder: str):
    records = [record("Hello " * n, "Eh" * n, prompt_id=f"é{n}") for n in range(1, 6)]
    pairs, _ = tokenize_pairs(records, tokenizer, max_length=64)
    path = (folder or f"{tmp_path}/") + "pairs.parquet"
    with open_write(path) as file:
        write_pairs(file, pairs)
    for written, read in zip(pairs, read_pairs(path), strict=True):
        assert read.prompt_id == written.prompt_id
        assert read.chosen_tokens.dtype == np.int32
        np.testing.assert_array_equal(read.chosen_tokens, written.chosen_tokens)
        np.testing.assert_array_equal(read.rejected_tokens, written.rejected_tokens)
        assert read.chosen_response_start == written.chosen_response_start
        assert read.rejected_response_start == written.rejected_response_start


def test_parquet_without_token_columns_is_refused_naming_them(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt_id": ["a"], "text": ["b"]}), tmp_path / "other.parquet")
    with pytest.raises(
        DataError, match=r"other\.parquet: the columns chosen_tokens, .* are missing \(it has prompt_id, text"
    ):
        read_pairs(str(tmp_path / "other.parquet"))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path):
    (tmp_path / "words.parquet").write_text("words")
    with pytest.raises(DataError, match=r"words\.parquet: not a readable Parquet file"):
        read_pairs(str(tmp_path / "words.parquet"))
