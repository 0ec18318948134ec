"""Settings of other projects are refused: the keys on the page on settings, and two seeds with their own messages."""

import pathlib
import re
from typing import Any

import pytest
import yaml

from experiments.settings.command_line import SETTINGS_PAGE, read_settings
from experiments.settings.sample_lm_multihost import SampleLmMultihostConfig
from experiments.settings.train_simpo import TrainSimpoConfig
from simpo_pipeline.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


def listed_keys() -> list[tuple[type, str]]:
    """Return the keys in the tables of the page, each with the class of the settings that its column is about."""
    keys: list[tuple[type, str]] = []
    for line in (ROOT / SETTINGS_PAGE).read_text().splitlines():
        if line.startswith("|"):
            _, training, sampler, instead, _ = line.split("|")
            assert instead.strip(), line
            keys += [(TrainSimpoConfig, key) for key in re.findall("`(.+?)`", training)]
            keys += [(SampleLmMultihostConfig, key) for key in re.findall("`(.+?)`", sampler)]
    return keys


def refusal(cls: type, key: str, folder: pathlib.Path) -> str:
    """Return the message about a settings file that has only this key, without the path of the file."""
    value: Any = 1
    for name in reversed(key.split(".")):
        value = {name: value}
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(ConfigError) as refused:
        read_settings(cls, str(path), [])
    source, _, sentence = str(refused.value).partition(": ")
    assert source == str(path)
    return sentence


@pytest.mark.parametrize(("cls", "key"), listed_keys())
def test_a_retired_knob_is_refused_in_one_sentence_with_its_file_and_what_to_do(cls, key, tmp_path):
    settings = r"the (nearest is|settings here are|settings of [\w.]+ are) [\w., ]+"
    expected = rf"{re.escape(key)} is not a setting; {settings}; see {re.escape(SETTINGS_PAGE)}\."
    assert re.fullmatch(expected, refusal(cls, key, tmp_path))


def test_the_page_lists_the_keys_that_once_drifted_and_no_key_twice():
    keys = listed_keys()
    drifted = {(SampleLmMultihostConfig, name) for name in ("engine.use_logical_reset", "max_prompts_per_batch")}
    assert drifted <= set(keys)
    assert len(set(keys)) == len(keys) > 80


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (TrainSimpoConfig, "data_seed is retired: set trainer.seed, which also determines the order of the data."),
        (SampleLmMultihostConfig, "engine.seed is retired: set seed at the top of the file."),
    ],
)
def test_a_seed_of_another_name_is_refused_with_the_setting_that_replaces_it(cls, sentence, tmp_path):
    assert refusal(cls, sentence.split()[0], tmp_path) == sentence
