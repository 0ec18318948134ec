"""No file holds NaN or an infinity: every writer of JSON refuses them, naming the file and the key."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.errors import DataError
from simpo_pipeline.storage.files import exists, read_bytes, write_json
from simpo_pipeline.storage.json_text import json_text, without_nan
from simpo_pipeline.storage.jsonl import JsonlWriter
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

NOT_FINITE = [math.nan, math.inf, -math.inf]
WHERE = [
    (lambda bad: {"loss": bad}, "loss"),
    (lambda bad: {"a": [1.0, {"b": (2, bad)}]}, r"a\[1\]\.b\[1\]"),
    (lambda bad: {"top_logprobs": [[[3, bad]]]}, r"top_logprobs\[0\]\[0\]\[1\]"),
]


def refuse_constant(name):
    raise AssertionError(f"the file holds {name}")


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize(("value_with", "key"), WHERE)
def test_every_writer_names_the_file_and_the_key_of_a_number_that_is_not_finite(tmp_path, bad, value_with, key):
    folder = str(tmp_path)
    words = rf"{key} is -?(nan|inf) and cannot be written to '.*x\.json'"
    with JsonlWriter(join(folder, "x.json")) as writer:
        with pytest.raises(DataError, match=words):
            writer.write(value_with(bad))
        writer.write({"n": 1})
    assert read_bytes(join(folder, "x.json")) == b'{"n": 1}\n'
    with pytest.raises(DataError, match=words):
        write_json(join(folder, "y", "x.json"), value_with(bad))
    with pytest.raises(DataError, match=words):
        OutputFolder(join(folder, "y")).write_json("x.json", value_with(bad))
    assert not exists(join(folder, "y", "x.json"))


@settings(max_examples=50, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_text_is_strict_json_or_refused_and_a_value_without_nan_is_always_text(value):
    try:
        assert json.loads(json_text(value, "x"), parse_constant=refuse_constant) == value
    except DataError:
        with pytest.raises(AssertionError):
            json.loads(json.dumps(value), parse_constant=refuse_constant)
    shown = json.loads(json_text(without_nan(value), "x"), parse_constant=refuse_constant)
    assert without_nan(value) == shown


def test_what_is_no_json_at_all_is_refused(tmp_path):
    circle: list = []
    circle.append(circle)
    for value in (object(), {"n": {1}}, circle, {"n": 10**5000}, {(1, 2): 3}):
        with pytest.raises(DataError, match="is not JSON"):
            write_json(str(tmp_path / "x"), value)


def test_half_of_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    with JsonlWriter(str(tmp_path / "x")) as writer:
        writer.write({"text": "\ud83d"})
    assert json.loads(read_bytes(str(tmp_path / "x"))) == {"text": "\ud83d"}
