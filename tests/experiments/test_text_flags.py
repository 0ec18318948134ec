"""Every text flag and text setting of every experiment takes its word on the command line exactly as it is."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.preset_flags import InterleaveFlags, PresetFlags
from experiments.settings.command_line import parse_command_line
from experiments.settings.sample_lm_multihost import SampleLmMultihostConfig
from experiments.settings.train_simpo import TrainSimpoConfig
from experiments.train_simpo import TrainFlags
from simpo_pipeline.config_files.parse import parse_flags
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.arguments import flag_values, parse_arguments
from simpo_pipeline.job.flags import JobFlags

FLAGS = (JobFlags, PresetFlags, InterleaveFlags, TrainFlags)
SETTINGS = (TrainSimpoConfig, SampleLmMultihostConfig)
AWKWARD = (
    *(
        "on",
        "off",
        "yes",
        "no",
        "y",
        "true",
        "False",
        "~",
        "None",
        "010",
        "0o7",
        "0x1F",
        "0b1",
        "1_000",
        "1e3",
        ".5",
        "1:30",
    ),
    *(
        ".inf",
        "NaN",
        "2024-01-01",
        "[",
        "]",
        "{",
        "}",
        "[a, b]",
        "{a: b}",
        "a: b",
        "a:",
        ":",
        "- a",
        "-",
        "-1",
        "-h",
        "---",
    ),
    *(
        "# a",
        "a # b",
        "&a",
        "*a",
        "!a",
        "!!str a",
        "|",
        ">",
        "@a",
        "`a",
        "%a",
        "'a'",
        '"a"',
        "'",
        '"',
        "\\n",
        "a\nb",
        "\t",
    ),
    *(
        "",
        " ",
        " a ",
        "<<",
        "=",
        "a=b",
        "?",
        ",",
        "--dry_run",
        "--",
        "é",
        "\u2028",
        "\x85",
        "\ufeff",
        "\udc80",
        "gs://b/[x]*",
    ),
)
words = st.sampled_from(AWKWARD) | st.text(max_size=10)


def text_keys(kind: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the keys of all text fields below a dataclass, and whether a field may be None."""
    for name, hint in ((field.name, typing.get_type_hints(kind)[field.name]) for field in dataclasses.fields(kind)):
        members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
        for member in members:
            if dataclasses.is_dataclass(member):
                yield from text_keys(member, f"{key}{name}.")
            elif typing.get_origin(member) is dict and dataclasses.is_dataclass(typing.get_args(member)[1]):
                yield from text_keys(typing.get_args(member)[1], f"{key}{name}.NAME.")
        if str in members and bool not in members:
            yield f"{key}{name}", type(None) in members


def flattened(values: dict[str, Any], key: str = "") -> dict[str, Any]:
    return {
        inner_key: inner
        for name, value in values.items()
        for inner_key, inner in (
            flattened(value, f"{key}{name}.") if isinstance(value, dict) else {f"{key}{name}": value}
        ).items()
    }


KEYS = {kind: list(text_keys(kind)) for kind in (*FLAGS, *SETTINGS)}


def test_the_experiments_have_text_flags():
    assert {key for key, _ in KEYS[InterleaveFlags]} == {
        *("prefix", "executor_info_base_path", "compilation_cache", "preset", "preflight", "export", "checkpoint.when"),
    }
    assert {"trainer.tracker.name", "data.components.NAME.source.id"} < {key for key, _ in KEYS[TrainSimpoConfig]}
    assert {"hf_checkpoint", "tokenizer", "prompts_path", "stop_sequence"} < {
        key for key, _ in KEYS[SampleLmMultihostConfig]
    }


@pytest.mark.parametrize("kind", FLAGS)
@given(text=words | st.just("null"))
def test_any_text_passes_through_every_text_flag(kind: type, text: str):
    keys = [key for key, _ in KEYS[kind]]
    assert flattened(flag_values(kind, [f"--{key}={text}" for key in keys])) == dict.fromkeys(keys, text)
    if not text.startswith("--"):
        in_words = [word for key in keys for word in (f"--{key}", text)]
        assert flattened(flag_values(kind, in_words)) == dict.fromkeys(keys, text)


@pytest.mark.parametrize("kind", SETTINGS)
@settings(max_examples=40)
@given(text=words)
def test_any_text_but_null_passes_through_every_text_setting(kind: type, text: str):
    keys = [key for key, _ in KEYS[kind]]
    expected = dict.fromkeys(keys, text)
    if text == "null":
        expected = {key: None if may_be_none else text for key, may_be_none in KEYS[kind]}
    assert flattened(parse_flags([f"--{key}={text}" for key in keys], "command line", kind)) == expected
    if not text.startswith("--"):
        in_words = [word for key in keys for word in (f"--{key}", text)]
        assert flattened(parse_flags(in_words, "command line", kind)) == expected


@pytest.mark.parametrize("kind", FLAGS)
def test_flags_that_name_paths_reach_the_config_as_text(kind: type):
    flags: Any = parse_arguments(
        kind, ["--compilation_cache", "off", "--prefix", "on", "--executor_info_base_path", "["]
    )
    assert (flags.compilation_cache, flags.prefix, flags.executor_info_base_path) == ("off", "on", "[")


def test_the_settings_file_is_found_under_its_literal_name():
    with pytest.raises(ConfigError, match=r"--config_path: Cannot read '010'"):
        parse_command_line(TrainSimpoConfig, ["--config_path", "010"], JobFlags)
