"""Settings are decoded strictly: each error is one sentence that names the key, where it was set, and what to do."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.config_files.decode import decode_yaml
from simpo_pipeline.config_files.parse import merge, parse_flags, split_flags
from simpo_pipeline.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Oven:
    RETIRED: ClassVar[Mapping[str, str]] = {"coal": "set mode to wood and leave the key out"}

    celsius: int
    fan: bool = False
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.celsius > 300:
            raise ConfigError(f"oven.celsius must be at most 300, got {self.celsius}")


@dataclasses.dataclass(frozen=True)
class Shelf:
    items: tuple[str, ...] = ()
    counts: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Kitchen:
    oven: Oven
    name: str = "kitchen"
    lamp: Oven | None = None
    shelves: dict[str, Shelf] = dataclasses.field(default_factory=dict)
    owner: bool | str = False
    mode: Literal["gas", "wood"] = "gas"


@dataclasses.dataclass(frozen=True)
class Note:
    note: str | None = "empty"


OVEN = "oven: {celsius: 180}\n"


def decode(text: str, *flags: str, page: str | None = None) -> Kitchen:
    return decode_yaml(Kitchen, text, source="kitchen.yaml", flags=flags, page=page)


def refusal(text: str, *flags: str, page: str | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        decode(text, *flags, page=page)
    return str(refused.value)


def test_a_file_decodes_to_the_dataclass_with_defaults_for_missing_keys():
    text = """
        oven: {celsius: 180, rate: 6e-7}
        lamp: {celsius: 40, fan: true}
        shelves: {top: {items: [salt, oil], counts: [1, 2]}, low: {}}
        owner: Ada
        mode: wood
    """
    assert decode(text) == Kitchen(
        oven=Oven(180, rate=6e-7),
        lamp=Oven(40, fan=True),
        shelves={"top": Shelf(("salt", "oil"), [1, 2]), "low": Shelf()},
        owner="Ada",
        mode="wood",
    )


@pytest.mark.parametrize("text", ["true", "010", "null", "1e3", "", "~", "3", "[a]"])
def test_text_in_quotes_is_that_text_wherever_text_is_allowed(text: str):
    kitchen = decode(
        f"oven: {{celsius: 1}}\nname: '{text}'\nowner: \"{text}\"\nshelves: {{'{text}': {{items: ['{text}']}}}}"
    )
    assert (kitchen.name, kitchen.owner, kitchen.shelves) == (text, text, {text: Shelf((text,))})
    assert decode_yaml(Note, f"note: '{text}'", source="f") == Note(text)


def test_a_member_of_a_union_takes_only_its_own_values():
    @dataclasses.dataclass(frozen=True)
    class Values:
        size: int | str | None = None
        rate: int | float = 0
        names: str | list[str] = ""

    def values(text: str) -> Values:
        return decode_yaml(Values, text, source="f")

    assert values("{size: '3', names: ['1', on]}") == Values("3", 0, ["1", "on"])
    assert values("{size: 010, rate: 1e0, names: '1'}") == Values(10, 1.0, "1")
    assert isinstance(values("rate: 1").rate, int) and isinstance(values("rate: 1.0").rate, float)


@pytest.mark.parametrize("text", ["6e-7", "1.5e7", "-2E+3", ".5e1", "1e0", "2.e3", "1.5", "3"])
def test_numbers_may_use_any_common_notation(text):
    assert decode(f"oven: {{celsius: 1, rate: {text}}}").oven.rate == float(text)


def test_the_command_line_overrides_the_file_key_by_key():
    kitchen = decode(
        "oven: {celsius: 180, fan: false}\nname: old\nlamp: {celsius: 20}\n",
        *("--oven.celsius", "200", "--oven.fan", "--name=--new", "--lamp", "null"),
        *("--shelves.top.counts", "[-1]"),
    )
    assert kitchen == Kitchen(Oven(200, fan=True), name="--new", lamp=None, shelves={"top": Shelf(counts=[-1])})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("oven: {celcius: 180}", "kitchen.yaml: oven.celcius is not a setting; the nearest is oven.celsius."),
        (OVEN + "celsius: 200", "kitchen.yaml: celsius is not a setting; the nearest is oven.celsius."),
        (
            OVEN + "shelves: {top: {qqq: 1}}",
            "kitchen.yaml: shelves.top.qqq is not a setting; the settings of shelves.top are items, counts.",
        ),
        (
            "oven: {celsius: 180, coal: 3}",
            "kitchen.yaml: oven.coal is retired: set mode to wood and leave the key out.",
        ),
        (
            OVEN + "lamp: {celsius: 40, coal: 3}",
            "kitchen.yaml: lamp.coal is retired: set mode to wood and leave the key out.",
        ),
        ("oven: {celsius: hot}", "kitchen.yaml: oven.celsius is 'hot'; expected an integer."),
        ("oven: {celsius: true}", "kitchen.yaml: oven.celsius is True; expected an integer."),
        ("oven: {celsius: 1.5}", "kitchen.yaml: oven.celsius is 1.5; expected an integer."),
        ("oven: {celsius: 180, rate: '1'}", "kitchen.yaml: oven.rate is '1'; expected a number."),
        ("oven: {celsius: 180, rate: .nan}", "kitchen.yaml: oven.rate is nan; expected a number."),
        (
            f"oven: {{celsius: 180, rate: {10**400}}}",
            f"kitchen.yaml: oven.rate is 1{'0' * 56}...; expected a number.",
        ),
        ("oven: {celsius: 180, fan: 1}", "kitchen.yaml: oven.fan is 1; expected true or false."),
        ("oven: {celsius: 180, fan: null}", "kitchen.yaml: oven.fan is null; expected true or false."),
        ("oven:", "kitchen.yaml: oven is null; expected a mapping with keys celsius, fan, rate."),
        (OVEN + "name: 3", "kitchen.yaml: name is 3; expected text; put text in quotes."),
        (OVEN + "name: null", "kitchen.yaml: name is null; expected text."),
        (OVEN + "owner: 3", "kitchen.yaml: owner is 3; expected true or false or text; put text in quotes."),
        (OVEN + "mode: coal", "kitchen.yaml: mode is 'coal'; expected one of gas, wood."),
        (OVEN + "lamp: 3", "kitchen.yaml: lamp is 3; expected a mapping or null."),
        (OVEN + "shelves: {1: {}}", "kitchen.yaml: shelves has the key 1, which is not text; put it in quotes."),
        (OVEN + "lamp: {celsius: hot}", "kitchen.yaml: lamp.celsius is 'hot'; expected an integer."),
        (
            OVEN + "shelves: {top: {items: salt}}",
            "kitchen.yaml: shelves.top.items is 'salt'; expected a list, each entry text.",
        ),
        (
            OVEN + "shelves: {top: {counts: [1, x]}}",
            "kitchen.yaml: shelves.top.counts[1] is 'x'; expected an integer.",
        ),
        ("name: no oven", "kitchen.yaml: oven is missing; give a mapping."),
        (OVEN + "lamp: {fan: true}", "kitchen.yaml: lamp.celsius is missing; give an integer."),
        ("oven: {celsius: 301}", "kitchen.yaml: oven.celsius must be at most 300, got 301"),
        (OVEN + "lamp: {celsius: 301}", "kitchen.yaml: oven.celsius must be at most 300, got 301"),
        ("[1, 2]", "kitchen.yaml: the file contains [1, 2]; expected a mapping of settings."),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text, sentence):
    assert refusal(text) == sentence


def test_an_unknown_key_of_either_source_refers_to_the_page_on_the_settings():
    assert refusal("oven: {celcius: hot, coal: 1}", "--shelves.top.qqq", "1", page="page.md").splitlines() == [
        "kitchen.yaml: oven.celcius is not a setting; the nearest is oven.celsius; see page.md.",
        "kitchen.yaml: oven.coal is retired: set mode to wood and leave the key out.",
        "command line: shelves.top.qqq is not a setting; the settings of shelves.top are items, counts; see page.md.",
    ]


def test_a_key_given_twice_is_refused_naming_its_line():
    assert refusal("name: a\n" + OVEN + "name: b\n") == (
        "kitchen.yaml: key 'name' is given twice, the second time on line 3; keep one."
    )
    assert "key 'fan' is given twice" in refusal("oven: {celsius: 1, fan: true, fan: false}")


def test_invalid_yaml_is_refused_naming_the_file_and_the_line():
    assert refusal("oven: [1").startswith("kitchen.yaml: ")
    assert "line 1" in refusal("oven: [1")
    assert "unhashable key" in refusal("? [a]\n: b")


def test_every_wrong_key_gets_its_own_sentence():
    assert refusal("oven: {celsius: hot, coal: 1}\nnam: x", "--mode", "coal").splitlines() == [
        "kitchen.yaml: oven.celsius is 'hot'; expected an integer.",
        "kitchen.yaml: oven.coal is retired: set mode to wood and leave the key out.",
        "kitchen.yaml: nam is not a setting; the nearest is name.",
        "command line: mode is 'coal'; expected one of gas, wood.",
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--oven.celcius", "3"], "command line: oven.celcius is not a setting; the nearest is oven.celsius."),
        (["--oven.coal", "3"], "command line: oven.coal is retired: set mode to wood and leave the key out."),
        (["--oven.celsius"], "command line: oven.celsius is True; expected an integer."),
        (["--name", "a", "--name", "b"], "command line: name is given twice, whole or in part; keep one."),
        (["--oven.fan", "--oven", "{}"], "command line: oven is given twice, whole or in part; keep one."),
        (["--name", "a", "--name.b", "c"], "command line: name.b is given twice, whole or in part; keep one."),
        (["--name.first", "a"], "command line: name is {'first': 'a'}; expected text."),
        (
            ["--name", "a", "b"],
            "command line: 'b' does not belong to a flag; write --key value, or --key=value for text.",
        ),
        (["--oven.celsius", "301"], "kitchen.yaml with the command line: oven.celsius must be at most 300, got 301"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(flags, sentence):
    assert refusal(OVEN, *flags) == sentence


def test_flags_are_split_by_name_with_their_values():
    words = [
        "--config_path",
        "a.yaml",
        "--trainer.seed",
        "-1",
        "--dry_run",
        "--prefix=x",
        "--beta",
        "2",
        "--lease.age",
        "3",
        "-h",
    ]
    ours, settings = split_flags(words, ["config_path", "dry_run", "prefix", "lease"])
    assert ours == ["--config_path", "a.yaml", "--dry_run", "--prefix=x", "--lease.age", "3", "-h"]
    assert settings == ["--trainer.seed", "-1", "--beta", "2"]


names = st.sampled_from(["a", "b", "c"])
trees = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8)
mappings = st.dictionaries(names, trees, max_size=3)


@settings(max_examples=40)
@given(base=mappings, over=mappings)
def test_merging_keeps_all_leaves_of_the_second_and_the_untouched_leaves_of_the_first(base, over):
    merged: Any = merge(base, over)
    assert merge(merged, over) == merged
    assert merge({}, over) == over and merge(base, {}) == base
    for key in base.keys() | over.keys():
        if key not in over:
            assert merged[key] == base[key]
        elif not isinstance(over[key], dict):
            assert merged[key] == over[key]


@settings(max_examples=40)
@given(
    value=st.one_of(
        st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers())
    )
)
def test_a_flag_carries_any_plain_value(value):
    text = str(value).lower() if isinstance(value, bool) else str(value)
    assert parse_flags([f"--a.b={text}"], "command line") == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["010", "1e3", "on", "~", "[", "{a: b", "'x'", "# a", "a: b", "", " ", "-1", "null"])
def test_a_text_setting_on_the_command_line_has_exactly_the_given_text(text):
    assert decode(OVEN, "--name", text).name == text
    assert decode(OVEN, f"--name={text}").name == text


@pytest.mark.parametrize(
    ("word", "owner"), [("true", True), ("False", False), ("on", "on"), ("010", "010"), ("[", "[")]
)
def test_a_setting_that_may_be_text_or_true_is_text_unless_it_is_a_value_of_the_other_type(word, owner):
    assert decode(OVEN, "--owner", word).owner is owner or decode(OVEN, "--owner", word).owner == owner


def test_the_word_null_sets_a_text_that_may_be_missing_to_none():
    assert parse_flags(["--note", "null"], "command line", Note) == {"note": None}
    assert parse_flags(["--note", "~"], "command line", Note) == {"note": "~"}


def test_a_flag_of_a_key_that_does_not_exist_is_named_whatever_its_value():
    assert refusal(OVEN, "--oven.celcius", "[") == (
        "command line: oven.celcius is not a setting; the nearest is oven.celsius."
    )
