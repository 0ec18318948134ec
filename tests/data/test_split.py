import numpy as np
import pytest

from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.data.split import is_held_out, split_pairs
from simpo_pipeline.errors import ConfigError, DataError


def pair(prompt: int, prompt_id: str = "") -> TokenizedPair:
    """Return a pair with a prompt of two tokens and answers of two and three tokens."""
    answer = np.arange(3, dtype=np.int32)
    tokens = np.concatenate([prompt_tokens(prompt), answer])
    return TokenizedPair(prompt_id or f"p{prompt}", tokens[:-1], tokens, 2, 2)


def prompt_tokens(prompt: int) -> np.ndarray:
    return np.array([prompt // 256, prompt % 256], dtype=np.int32)


def test_about_the_requested_fraction_is_held_out_and_the_rest_keeps_its_order():
    pairs = [pair(index) for index in range(1000)]
    train, held_out = split_pairs(pairs, 0.2)
    assert 160 <= len(held_out) <= 240
    assert sorted([*train, *held_out], key=lambda pair: int(pair.prompt_id[1:])) == pairs
    assert [pair.prompt_id for pair in train] == [pair.prompt_id for pair in pairs if pair not in held_out]


def test_a_larger_fraction_holds_out_a_superset_of_the_prompts():
    few, many = ({i for i in range(200) if is_held_out(prompt_tokens(i), share)} for share in (0.1, 0.3))
    assert few < many


def test_all_pairs_of_a_prompt_are_on_one_side_and_the_side_never_changes():
    prompts = (0, 1, 0, 2, 1, 3, 4)
    train, held_out = split_pairs([pair(prompt, f"row {row}") for row, prompt in enumerate(prompts)], 0.5)
    assert [each.prompt_id for each in held_out] == ["row 1", "row 3", "row 4", "row 6"]
    assert [each.prompt_id for each in train] == ["row 0", "row 2", "row 5"]


def test_a_fraction_of_zero_holds_out_nothing():
    assert split_pairs([pair(0)], 0.0)[1] == []


def test_a_split_without_pairs_on_one_side_is_refused():
    with pytest.raises(DataError, match=r"0\.001 of 1 pairs leaves 1 to train on and 0 to evaluate on"):
        split_pairs([pair(0)], 0.001)
    with pytest.raises(DataError, match="leaves 0 to train on and 1"):
        split_pairs([pair(0)], 0.999999)
    with pytest.raises(ConfigError, match=r"validation_fraction is 1\.0"):
        split_pairs([pair(0)], 1.0)
