"""The shipped preference set and prompts match the output of their script and are suitable for training."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.data.chat import stop_token_ids
from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.prompts import PromptsConfig, load_prompts
from simpo_pipeline.data.records import PreferenceRecord, read_records
from simpo_pipeline.data.tokenize import tokenize_pairs

DATA = Path(__file__).parents[2] / "experiments" / "data"


@pytest.fixture(scope="module")
def records() -> list[PreferenceRecord]:
    return list(read_records(PreferenceSource(str(DATA / "preferences.jsonl"))))


def test_the_file_matches_the_output_of_its_script():
    made = runpy.run_path(str(DATA / "make_preferences.py"))["make_text"]()
    shipped = (DATA / "preferences.jsonl").read_text(encoding="utf-8")
    assert made == shipped, "run experiments/data/make_preferences.py and commit the file"


def test_there_are_at_least_512_pairs_with_distinct_prompts_and_names(records: list[PreferenceRecord]):
    assert len(records) >= 512
    assert len({record.prompt for record in records}) == len(records)
    assert len({record.prompt_id for record in records}) == len(records)


def test_the_prompt_column_is_the_question_asked(records: list[PreferenceRecord]):
    lines = (DATA / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [record.prompt[0].content for record in records]


def test_no_kind_of_preference_makes_up_most_of_the_set(records: list[PreferenceRecord]):
    kinds = [record.prompt_id.rpartition("-")[0] for record in records]
    largest = max(set(kinds), key=kinds.count)
    assert kinds.count(largest) < len(records) / 5, largest


def test_better_answers_are_not_simply_the_longer_or_the_shorter_ones(records: list[PreferenceRecord]):
    lengths = [(len(record.chosen[-1].content), len(record.rejected[-1].content)) for record in records]
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    shorter = sum(chosen < rejected for chosen, rejected in lengths)
    assert min(longer, shorter) > len(records) / 5


def test_all_pairs_fit_the_tiny_presets_rows_in_bytes(records: list[PreferenceRecord], tokenizer: Any):
    _, stats = tokenize_pairs(records, tokenizer, max_length=384)
    assert stats.num_pairs == len(records)


def test_all_pairs_fit_128_tokens_of_the_default_model(records: list[PreferenceRecord], smollm2_tokenizer: Any):
    _, stats = tokenize_pairs(records, smollm2_tokenizer, max_length=128)
    assert stats.num_pairs == len(records)
    assert smollm2_tokenizer.decode(list(stop_token_ids(smollm2_tokenizer))) == "<|im_end|>"


def test_the_128_shipped_prompts_are_distinct_and_not_in_the_training_set(records: list[PreferenceRecord]):
    prompts = load_prompts(PromptsConfig(prompts_path=str(DATA / "prompts.txt")))
    assert len(prompts) == len(set(prompts)) == 128
    assert not set(prompts) & {record.prompt[0].content for record in records}
    assert (DATA / "prompts.txt").read_text(encoding="utf-8").splitlines() == list(prompts)
