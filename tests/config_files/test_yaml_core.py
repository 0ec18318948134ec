"""Plain scalars are those of the YAML 1.2 core schema; what two versions of YAML read differently is refused."""

import contextlib
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.config_files.parse import parse_yaml
from simpo_pipeline.config_files.yaml_core import load_yaml
from simpo_pipeline.errors import ConfigError, SimpoPipelineError

# The table of section 10.3.2 of the YAML 1.2.2 specification, "Tag Resolution", row by row.
TABLE = (
    (r"null | Null | NULL | ~", "null"),
    (r"", "null"),
    (r"true | True | TRUE | false | False | FALSE", "bool"),
    (r"[-+]? [0-9]+", "int"),
    (r"0o [0-7]+", "octal"),
    (r"0x [0-9a-fA-F]+", "hexadecimal"),
    (r"[-+]? ( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?", "float"),
    (r"[-+]? ( \.inf | \.Inf | \.INF )", "infinity"),
    (r"\.nan | \.NaN | \.NAN", "not a number"),
)
VALUES = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 10),
    "octal": lambda text: int(text[2:], 8),
    "hexadecimal": lambda text: int(text[2:], 16),
    "float": float,
    "infinity": lambda text: -math.inf if text.startswith("-") else math.inf,
    "not a number": lambda text: math.nan,
}
EXAMPLES = (
    *(
        "010",
        "0o10",
        "0x1F",
        "0b1",
        "1_000",
        "1:30",
        "190:20:30",
        "-0",
        "+7",
        "00",
        "08",
        "0o8",
        "-0o7",
        "0X1F",
        "1__0",
    ),
    *(
        "1.",
        ".5",
        "-.5",
        "1e3",
        "1E+3",
        "6e-7",
        "1.5e7",
        "1e",
        "e1",
        ".",
        "..5",
        "1.5.2",
        ".inf",
        "-.INF",
        "+.Inf",
        ".iNf",
    ),
    *(
        ".nan",
        ".NaN",
        ".Nan",
        "inf",
        "nan",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
        "Yes",
        "ON",
        "true",
        "True",
        "TRUE",
        "tRUE",
    ),
    *(
        "false",
        "~",
        "null",
        "Null",
        "NULL",
        "nULL",
        "",
        "2024-01-01",
        "2024-01-01T00:00:00Z",
        "=",
        "None",
        "0x",
        "0o",
        "+",
    ),
)


def expected(text: str) -> Any:
    for pattern, name in TABLE:
        if re.fullmatch(pattern, text, re.VERBOSE):
            return VALUES[name](text)
    return text


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and (left == right or (left != left and right != right))


@pytest.mark.parametrize("text", EXAMPLES)
def test_plain_scalars_are_those_of_the_core_schema(text: str):
    assert same(load_yaml(f"k: {text}\n", "file")["k"], expected(text))
    assert load_yaml(f'k: "{text}"\n', "file") == {"k": text}


numeric = st.text("0123456789+-._eExXoObaAfFiInN~", min_size=1, max_size=8)
in_table = st.one_of(
    *[st.from_regex(re.compile(pattern, re.VERBOSE | re.ASCII), fullmatch=True) for pattern, _ in TABLE]
)


@settings(max_examples=50)
@given(text=(numeric | in_table).filter(lambda text: text != "-" and len(text) < 200))
def test_any_scalar_that_looks_like_a_number_is_resolved_by_the_table(text: str):
    value = expected(text)
    if value in (math.inf, -math.inf) and "inf" not in text.lower():
        with pytest.raises(ConfigError, match="is too large for a number"):
            load_yaml(f"k: {text}", "file")
    else:
        assert same(load_yaml(f"k: {text}", "file")["k"], value)


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "file.yaml")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("file.yaml: ")
    return str(refused.value)


BOMB = "a: &a [1,2,3,4,5,6,7,8,9,0]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"k{index}: &k{index} {{<<: [{','.join(['*' + (f'k{index - 1}' if index else 'a')] * 10)}]}}\n"
    for index in range(9)
)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        *[
            (f"k: !!{tag} 1", f"the tag 'tag:yaml.org,2002:{tag}' is not read")
            for tag in ("int", "str", "binary", "set")
        ],
        ("k: !!python/object/apply:os.system [ls]", "is not read; write the value without it"),
        ("k: !local 1", "the tag '!local' is not read"),
        ("k: ! 1", "the tag '!' is not read"),
        ("!!map {k: 1}", "the tag"),
        ("? !!str k\n: 1", "the tag"),
        ("%YAML 1.1\n---\nk: 1", "the document declares YAML 1.1; only YAML 1.2 is read"),
        ("k: 1\n---\nk: 2", "document"),
        ("a: 1\n'a': 2", "key 'a' is given twice, the second time on line 2; keep one"),
        ("{0x1: a, 1: b}", "key '1' is given twice"),
        ("{1.0: a, 1: b}", "key '1' is given twice"),
        ("{a: {b: 1, b: 2}}", "key 'b' is given twice"),
        ("k: [{<<: {a: 1}, <<: {b: 1}}]", "key '<<' is given twice"),
        (BOMB, "its aliases repeat more than 100000 values"),
        (MERGE_BOMB, "its aliases repeat more than 100000 values"),
        ("k: &a [*a]", "an anchor contains an alias of itself"),
        ("k: &a {b: *a}", "an anchor contains an alias of itself"),
        ("k: " + "[" * 2000, "nested too deeply"),
        ("k: " + "9" * 5000, "has 5000 digits; give a smaller number"),
        ("k: 1e400", "1e400 is too large for a number; write .inf for infinity"),
        ('k: "\\ud83d"', "half of a surrogate pair"),
        ('k: "\\UFFFFFFFF"', "a value is out of range"),
        ("k: a\x85b", r"line 1 contains the character U+0085, .*; write it as \N in double quotes"),
        ("x: 1\nk: 'a\u2028b'", r"line 2 contains the character U+2028"),
        ("k: *unknown", "undefined alias"),
        ("k: \x00", "special characters are not allowed"),
    ],
)
def test_what_is_not_read_is_refused_in_one_sentence(text: str, complaint: str):
    found = refusal(text)
    assert complaint.partition(".*")[0] in found and complaint.rpartition(".*")[2] in found


def test_aliases_and_merge_keys_are_read():
    text = (
        "base: &base {a: 1, b: 2}\nover: {<<: *base, b: 3}\nsame: *base\nquoted: {'<<': 1}\n"
        "deep: {in: &in {<<: *base, a: 9}, k: {<<: *in}}"
    )
    base = {"a": 1, "b": 2}
    assert load_yaml(text, "file") == {
        "base": base,
        "over": {"a": 1, "b": 3},
        "same": base,
        "quoted": {"<<": 1},
        "deep": {"in": {"a": 9, "b": 2}, "k": {"a": 9, "b": 2}},
    }


def test_escapes_give_the_characters_that_are_refused_unescaped():
    assert load_yaml(r'k: "a\Nb\Lc\Pd\x85"', "file") == {"k": "a\x85b\u2028c\u2029d\x85"}


@given(text=st.text(st.sampled_from(list("abk019:-?,[]{}#&*!|>'\"%@`~ \n\t<=.\\/xuUé\u2028\ufeff")), max_size=30))
def test_any_text_is_a_value_or_a_config_error(text: str):
    with contextlib.suppress(SimpoPipelineError):
        load_yaml(text, "file")
