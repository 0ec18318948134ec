import dataclasses
import datetime
import enum
import json
import pathlib
import re
import string
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpo_pipeline.errors import IdentityError, LiveEdgeError, PlanError
from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.planning.identity import canonical, find_markers
from simpo_pipeline.executor.step import ExecutorStep, borrow, ensure_versioned, output_path_of, take, versioned


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Rates:
    first: Any = 1.0
    rest: Any = ()


@dataclass(frozen=True)
class Config:
    a: Any = None
    b: Any = None


def hash_of(config: Any, name: str = "step", prefix: str = "/prefix") -> str:
    step = ExecutorStep(name, None, config)
    return build_graph([step], prefix).identities[step].hash


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: Any) -> Any:
    """Return the same value with the keys of every dict in reverse order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


@given(plain)
def test_identity_does_not_depend_on_the_order_of_keys(value):
    assert hash_of({"x": versioned(value)}) == hash_of({"x": versioned(reordered(value))})


@given(plain, plain)
def test_two_values_have_the_same_form_exactly_if_their_json_is_the_same(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    forms = [json.dumps(canonical(value, "x"), sort_keys=True) for value in (one, other)]
    assert (forms[0] == forms[1]) == same


@given(st.dictionaries(st.text(string.ascii_letters, min_size=1), st.integers(), max_size=6))
def test_identity_does_not_depend_on_the_order_of_a_configs_entries(entries):
    forwards = {key: versioned(value) for key, value in entries.items()}
    assert hash_of(forwards) == hash_of(dict(reversed(forwards.items())))


@given(plain, plain)
def test_values_that_are_not_versioned_are_not_part_of_the_identity(one, other):
    assert hash_of(Config(versioned(1), one)) == hash_of(Config(versioned(1), other))


@given(st.sets(st.integers() | st.text()))
def test_sets_have_no_order(members):
    assert canonical(set(members), "x") == canonical(frozenset(sorted(members, key=repr, reverse=True)), "x")


def test_identity_is_the_same_in_another_process_with_another_hash_seed(tmp_path: pathlib.Path):
    program = (
        "from simpo_pipeline.executor.planning.graph import build_graph\n"
        "from simpo_pipeline.executor.step import *\n"
        "first = ExecutorStep('first', None, {'b': versioned({'x', 'y', 'zz'}), 'a': versioned(0.1)})\n"
        "second = ExecutorStep('second', None, [first / 'sub', borrow(first)])\n"
        "print(build_graph([second], '/p').identities[second].hash)\n"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(hashes) == 1


def test_name_values_and_dependencies_change_the_identity_and_nothing_else_does():
    base = hash_of(Config(versioned(1)))
    assert hash_of(Config(versioned(1)), prefix="gs://elsewhere") == base
    assert hash_of(Config(versioned(1), lambda: 0)) == base
    assert hash_of(Config(versioned(2))) != base
    assert hash_of(Config(None, versioned(1))) != base
    assert hash_of(Config(versioned(1)), name="other") != base


def test_how_a_dependency_is_used_changes_the_identity():
    made = ExecutorStep("made", None, Config(versioned(1)))
    uses = [
        made,
        made / "sub",
        made / "other",
        made.nonblocking(),
        (made / "sub").nonblocking(),
        borrow(made),
        take(made),
        output_path_of(ExecutorStep("made", None, Config(versioned(2)))),
    ]
    assert len({hash_of(Config(use)) for use in uses}) == len(uses)
    assert hash_of(Config(made)) == hash_of(Config(output_path_of(made)))


def test_a_change_far_upstream_changes_every_identity_downstream():
    def last(value: int) -> ExecutorStep:
        step = ExecutorStep("start", None, Config(versioned(value)))
        for number in range(3):
            step = ExecutorStep(f"next-{number}", None, Config(step))
        return step

    graphs = [build_graph([last(value)], "/p") for value in (1, 2)]
    hashes = [{identity.hash for identity in graph.identities.values()} for graph in graphs]
    assert not hashes[0] & hashes[1]


def test_different_kinds_of_value_have_different_forms():
    values = [
        1, 1.0, "1", True, None, [1], (1, 1), {1}, {"a": 1}, Colour.RED, Colour.BLUE, b"1", pathlib.PurePosixPath("1"),
        Rates(), Config(), datetime.date(2026, 1, 1), datetime.timedelta(1), re.compile("1"), Rates, Config,
    ]  # fmt: skip
    forms = [json.dumps(canonical(value, "x"), sort_keys=True) for value in values]
    assert len(set(forms)) == len(values)


def test_a_dict_that_looks_like_a_tagged_value_is_not_mistaken_for_one():
    assert canonical({"!enum": "Colour.RED"}, "x") != canonical(Colour.RED, "x")


def test_numpy_scalars_have_the_form_of_their_python_values():
    assert canonical(np.int64(3), "x") == 3
    assert canonical(np.float32(0.5), "x") == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: 0, "Pass a name"),
        (print, "Pass a name"),
        (object(), "Pass a name"),
        (np.zeros(3), "tolist"),
        ({1: 2}, "keys must be str"),
        ([versioned(1)], "markers"),
        ([ExecutorStep("x", None, None)], "markers"),
    ],
)
def test_a_value_without_a_canonical_form_is_an_error_naming_the_field(value, message):
    with pytest.raises(IdentityError, match=message) as caught:
        find_markers(Config(b=Rates(rest=[0, versioned({"deep": value})])))
    assert "b.rest[1].deep" in str(caught.value)


@pytest.mark.parametrize("marker", [versioned(1), ExecutorStep("x", None, None), take(ExecutorStep("x", None, None))])
def test_a_marker_cannot_be_versioned(marker):
    with pytest.raises(IdentityError, match="markers need no versioned"):
        versioned(marker)


def test_ensuring_a_version_twice_changes_nothing():
    assert ensure_versioned(ensure_versioned(3)) == versioned(3)


def test_keys_with_dots_are_not_mistaken_for_nested_fields():
    one = find_markers({"a.b": versioned(1), "a": {"b": versioned(2)}}).versioned
    assert sorted(one.values()) == [1, 2]


@pytest.mark.parametrize("name", ["", "/abs", "a//b", "../up", "a/./b", ".hidden", "a/.b", "a/"])
def test_a_name_that_is_not_a_relative_path_is_refused(name):
    with pytest.raises(PlanError, match="Rename the step"):
        ExecutorStep(name, None, None)


@pytest.mark.parametrize("use", [borrow, take])
def test_only_steps_can_be_borrowed_or_taken(use):
    with pytest.raises(LiveEdgeError, match="Pass the ExecutorStep"):
        use(output_path_of(ExecutorStep("x", None, None)))


def test_a_cycle_is_an_error_that_names_its_steps():
    uses: list[Any] = []
    first = ExecutorStep("first", None, uses)
    second = ExecutorStep("second", None, [first])
    uses.append(second)
    with pytest.raises(PlanError, match=r"first after second after first|second after first after second"):
        build_graph([first], "/p")


def test_the_repr_of_a_step_contains_only_its_name():
    assert repr(ExecutorStep("train", None, dataclasses.replace(Config(), a=1))) == "ExecutorStep(name='train')"


@pytest.mark.parametrize("place", [lambda marker: {"deep": {marker}}, lambda marker: {"deep": {marker: 1}}])
def test_a_marker_where_it_would_be_overlooked_is_refused(place):
    step = ExecutorStep("first", None, None)
    with pytest.raises(IdentityError, match="'deep' contain a step or a marker"):
        find_markers(place(step))
