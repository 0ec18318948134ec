"""Prompts come from one source, and hosts shard them without gaps or overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.data.prompts import PromptsConfig, load_prompts, prompt_shard
from simpo_pipeline.errors import ConfigError, DataError


def test_prompts_are_taken_as_given():
    config = PromptsConfig(prompts=("a", "b"))
    assert load_prompts(config) == ("a", "b")
    assert config.count == 2


def test_synthetic_prompts_contain_their_index():
    config = PromptsConfig(synthetic_prompt_count=2, synthetic_prompt_template="M11 prompt {index}: explain {{x}}.")
    assert config.count == 2
    assert load_prompts(config) == ("M11 prompt 0: explain {x}.", "M11 prompt 1: explain {x}.")


def test_a_file_has_one_prompt_per_line_and_blank_lines_are_skipped(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  two  \n")
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
        ({"synthetic_prompt_count": 0}, "synthetic_prompt_count must be positive, got 0"),
        ({"prompts": ("a", " ")}, r"prompts\[1\] is empty"),
        ({"synthetic_prompt_count": 1, "synthetic_prompt_template": "{number}"}, r"only field is \{index\}"),
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
