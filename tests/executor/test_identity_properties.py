"""Property tests: what an identity depends on, and what it does not depend on."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpo_pipeline.errors import IdentityError
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.step import (
    ExecutorStep,
    InputName,
    borrow,
    output_path_of,
    take,
    this_output_path,
    unwrap_versioned_value,
    versioned,
)
from simpo_pipeline.processes import Processes


@dataclass(frozen=True)
class Pair:
    a: Any = None
    b: Any = None


class Key(str, Enum):  # noqa: UP042 - as in configs from before StrEnum existed
    A = "a"


unhurried = settings(deadline=None)
HOLE = object()
KEYS = st.text("ab.[]'\"!\\0", max_size=6) | st.sampled_from(
    ["!set", "!enum", "!class", "!bytes", "!dataclass", "!step", "!!set", "a.b", "a[0]", "['a']", "Pair"]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    KEYS,
    st.binary(max_size=5),
    st.sampled_from([0, 1, False, True, 0.0, 1.0, "", "0", "1", "None", "true", b"", b"1", ()]),
)
LEAVES = SCALARS | st.frozensets(SCALARS, max_size=3)
SKELETONS = st.recursive(
    st.just(HOLE),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


def holes(skeleton: Any) -> int:
    """Return the number of holes in the skeleton."""
    if skeleton is HOLE:
        return 1
    if isinstance(skeleton, Pair):
        return holes(skeleton.a) + holes(skeleton.b)
    return sum(map(holes, skeleton.values() if isinstance(skeleton, dict) else skeleton))


def filled(skeleton: Any, leaves: list[Any]) -> Any:
    """Return the skeleton with its holes filled in order. The used values are removed from `leaves`."""
    if skeleton is HOLE:
        return leaves.pop(0)
    if isinstance(skeleton, Pair):
        return Pair(filled(skeleton.a, leaves), filled(skeleton.b, leaves))
    if isinstance(skeleton, dict):
        return {key: filled(inner, leaves) for key, inner in skeleton.items()}
    return type(skeleton)(filled(inner, leaves) for inner in skeleton)


def meaning(value: Any) -> tuple[Any, ...]:
    """Return a form that is equal exactly for values that must have one identity.

    Lists equal tuples, sets equal frozensets, and the order of dict keys does not matter.
    """
    if isinstance(value, Pair):
        return ("pair", meaning(value.a), meaning(value.b))
    if isinstance(value, list | tuple):
        return ("sequence", *map(meaning, value))
    if isinstance(value, set | frozenset):
        return ("set", *sorted((meaning(member) for member in value), key=repr))
    if isinstance(value, dict):
        return ("dict", *sorted((key, meaning(inner)) for key, inner in value.items()))
    return (type(value).__name__, repr(value))


def hash_of(config: Any, name: str = "step") -> str:
    step = ExecutorStep(name, None, config)
    return build_graph([step], "/prefix").identities[step].hash


def reordered(value: Any) -> Any:
    """Return the same value with keys in reverse order, lists for tuples and sets for frozensets."""
    if isinstance(value, Pair):
        return Pair(reordered(value.a), reordered(value.b))
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list | tuple):
        return [reordered(inner) for inner in value]
    return set(value) if isinstance(value, frozenset) else value


@unhurried
@given(st.data(), SKELETONS)
def test_the_identity_changes_exactly_if_one_leaf_of_a_versioned_value_does(data: st.DataObject, skeleton: Any):
    leaves = data.draw(st.lists(LEAVES, min_size=holes(skeleton), max_size=holes(skeleton)))
    other = list(leaves)
    if leaves:
        other[data.draw(st.integers(0, len(leaves) - 1))] = data.draw(LEAVES)
    one, two = filled(skeleton, leaves.copy()), filled(skeleton, other)
    assert (hash_of(versioned(one)) == hash_of(versioned(two))) == (meaning(one) == meaning(two))


@unhurried
@given(SKELETONS, SKELETONS)
def test_values_of_different_shape_have_different_identities(one: Any, two: Any):
    values = [filled(skeleton, [0] * holes(skeleton)) for skeleton in (one, two)]
    same = meaning(values[0]) == meaning(values[1])
    assert (hash_of(versioned(values[0])) == hash_of(versioned(values[1]))) == same


@unhurried
@given(st.data(), SKELETONS)
def test_order_of_keys_and_kind_of_sequence_are_not_part_of_the_identity(data: st.DataObject, skeleton: Any):
    value = filled(skeleton, data.draw(st.lists(LEAVES, min_size=holes(skeleton), max_size=holes(skeleton))))
    assert hash_of(versioned(value)) == hash_of(versioned(reordered(value)))
    config = filled(skeleton, [versioned(number) for number in range(holes(skeleton))])
    backwards = {"x": reordered(config), "y": 1}
    assert hash_of({"y": 2, "x": config}) == hash_of(backwards)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, True),
        (0, False),
        (1, 1.0),
        (1, "1"),
        (None, "None"),
        (0.0, -0.0),
        ("", b""),
        ([], {}),
        ([], set()),
        ([], None),
    ],
)
def test_values_that_python_or_a_reader_might_confuse_have_different_identities(one: Any, two: Any):
    assert hash_of(versioned(one)) != hash_of(versioned(two))
    assert hash_of(versioned({"k": [one]})) != hash_of(versioned({"k": [two]}))


def at(place: list[str | int], value: Any) -> Any:
    """Return a config with the value at a position. A string in the position is a key, an integer an index."""
    for part in reversed(place):
        value = {part: value} if isinstance(part, str) else [*[None] * part, value]
    return value


PLACES = st.lists(KEYS | st.integers(0, 2), max_size=4)


@unhurried
@given(PLACES, PLACES)
def test_two_positions_in_a_config_are_never_confused(one: list[str | int], two: list[str | int]):
    assert (hash_of(at(one, versioned(1))) == hash_of(at(two, versioned(1)))) == (one == two)


@unhurried
@given(st.data(), st.lists(KEYS, min_size=2, max_size=5, unique=True))
def test_moving_values_to_other_keys_changes_the_identity(data: st.DataObject, keys: list[str]):
    shuffled = data.draw(st.permutations(range(len(keys))))
    one = {key: versioned(number) for number, key in enumerate(keys)}
    two = {key: versioned(number) for key, number in zip(keys, shuffled, strict=True)}
    assert (hash_of(one) == hash_of(two)) == (shuffled == list(range(len(keys))))


def test_a_string_key_that_is_also_an_enum_is_not_a_nested_field():
    hashes = {hash_of({"x": {Key.A: versioned(number), "Key": {"A": versioned(0)}}}) for number in range(3)}
    assert len(hashes) == 3


def test_keys_that_are_equal_sets_are_the_same_position():
    assert repr(frozenset([0, 8])) != repr(frozenset([8, 0]))
    assert hash_of({frozenset([0, 8]): versioned(1)}) == hash_of({frozenset([8, 0]): versioned(1)})


def test_a_key_that_differs_between_processes_is_refused_if_it_leads_to_a_versioned_value():
    with pytest.raises(IdentityError):
        hash_of({object(): versioned(1)})
    assert hash_of([{object(): 1}, versioned(1)]) == hash_of([{object(): 2}, versioned(1)])


def test_an_emoji_and_its_surrogate_pair_have_different_identities_or_are_refused():
    try:
        halves = hash_of(versioned("\ud83d\ude00"))
    except IdentityError:
        return
    assert halves != hash_of(versioned("\U0001f600"))


def test_long_regular_expressions_are_distinguished():
    one, two = (re.compile("a" * 300 + end) for end in ("x", "y"))
    assert hash_of(versioned(one)) != hash_of(versioned(two))


def test_a_value_that_imitates_a_dependency_is_not_one():
    made = ExecutorStep("made", None, versioned(1))
    label = f"made-{hash_of(versioned(1), 'made')}"
    imitation = {"!step": label, "use": "saved", "sub_path": None}
    assert hash_of({"x": versioned(imitation)}) != hash_of({"x": made})


USES = {
    "path": lambda step: step,
    "sub-path": lambda step: step / "sub",
    "other sub-path": lambda step: step / "other",
    "deeper sub-path": lambda step: step / "sub" / "sub",
    "nonblocking": lambda step: step.nonblocking(),
    "nonblocking sub-path": lambda step: (step / "sub").nonblocking(),
    "borrow": borrow,
    "take": take,
    "a fixed path": lambda step: InputName.hardcoded("/prefix/sub"),
}


def chain(start: Any, uses: list[str], last_use: str) -> str:
    """Return the hash of the last step of a chain."""
    step = ExecutorStep("start", None, {"value": versioned(start)})
    for number, use in enumerate([*uses, last_use]):
        step = ExecutorStep(f"step-{number}", None, {"input": USES[use](step)})
    return build_graph([step], "/prefix").identities[step].hash


@settings(unhurried, max_examples=25)
@given(st.lists(st.sampled_from([use for use in USES if use != "a fixed path"]), max_size=4))
def test_every_use_of_a_dependency_has_its_own_identity_and_propagates_changes(uses: list[str]):
    hashes = {(start, last): chain(start, uses, last) for start in (1, 2) for last in USES}
    assert hashes.pop((1, "a fixed path")) == hashes.pop((2, "a fixed path"))
    assert len(set(hashes.values())) == len(hashes)


def test_one_path_written_in_two_ways_has_one_identity():
    made = ExecutorStep("made", None, versioned(1))
    assert hash_of(made / "a" / "b") == hash_of(made / "a/b") == hash_of(output_path_of(made, "a/b"))
    assert hash_of(made) == hash_of(made.as_input_name()) == hash_of(output_path_of(made))


@unhurried
@given(st.from_regex(r"[a-z0-9-]{1,5}(/[a-z0-9-]{1,5})?", fullmatch=True), st.data())
def test_the_name_of_a_step_is_part_of_its_identity_and_of_its_dependents(name: str, data: st.DataObject):
    other = data.draw(st.sampled_from([f"{name}-", f"{name}/x", f"x{name}"]))
    assert hash_of(versioned(1), name) != hash_of(versioned(1), other)
    users = [hash_of([ExecutorStep(made, None, versioned(1)) / "sub"]) for made in (name, other)]
    assert users[0] != users[1]


@unhurried
@given(st.sampled_from(["/other", "gs://bucket/x", "memory://m"]), st.text(max_size=5), st.integers())
def test_settings_of_where_and_how_a_step_runs_are_not_part_of_the_identity(prefix: str, text: str, number: int):
    plain = ExecutorStep("made", None, {"value": versioned(1), "free": 0})
    dressed = ExecutorStep(
        "made",
        lambda config: None,
        {"free": {text: [number, this_output_path(f"x{number}")]}, "more": text, "value": versioned(1)},
        description=text,
        override_output_path="elsewhere",
        pip_dependency_groups=[text],
        resources=number,
    )
    users = [ExecutorStep("user", None, [made / "x", borrow(made)]) for made in (plain, dressed)]
    graphs = [build_graph([users[0]], "/prefix"), build_graph([users[1]], prefix)]
    assert graphs[0].identities[users[0]].version_str == graphs[1].identities[users[1]].version_str


def tree(order: list[int]) -> list[ExecutorStep]:
    """Build four independent steps and four steps that use two of them each, in the given order."""
    made: dict[int, ExecutorStep] = {
        number: ExecutorStep(f"made-{number}", None, versioned(number)) for number in order
    }
    users: dict[int, ExecutorStep] = {}
    for number in order:
        uses = {"one": made[number] / "x", "two": [made[(number + 1) % 4], borrow(made[number])]}
        users[number] = ExecutorStep(f"user-{number}", None, uses)
    return [users[number] for number in order]


@unhurried
@given(st.permutations(range(4)), st.permutations(range(4)))
def test_the_order_in_which_steps_are_built_and_requested_is_not_part_of_the_identity(built, requested):
    steps, usual = tree(list(built)), build_graph(tree([0, 1, 2, 3]), "/prefix")
    graph = build_graph([steps[index] for index in requested], "/prefix")
    hashes = [{step.name: one.identities[step].hash for step in one.steps} for one in (graph, usual)]
    assert hashes[0] == hashes[1]


def test_hosts_and_the_working_directory_are_not_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step = ExecutorStep("step", None, {"path": versioned(Path("relative/file")), "x": this_output_path()})
    many = Processes(0, 3, gather=lambda value: [value] * 3)
    texts: set[str] = set()
    for folder, processes in ((tmp_path, Processes()), (Path("/"), many)):
        monkeypatch.chdir(folder)
        monkeypatch.setattr("socket.gethostname", lambda: f"host-{len(texts)}")
        executor = Executor("memory://hosts", processes=processes)
        executor.run([step], dry_run=True)
        texts.add(executor.version_strs[step])
    assert len(texts) == 1


@unhurried
@given(st.data(), SKELETONS)
def test_unwrapping_the_versions_restores_the_value(data: st.DataObject, skeleton: Any):
    leaves = data.draw(st.lists(LEAVES, min_size=holes(skeleton), max_size=holes(skeleton)))
    marked = filled(skeleton, [versioned(leaf) for leaf in leaves])
    assert repr(unwrap_versioned_value(marked)) == repr(filled(skeleton, leaves.copy()))


EXPERIMENT = """
import json, sys
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import Enum, Flag, StrEnum
from pathlib import Path, PurePosixPath
from typing import Any
from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.step import ExecutorStep, borrow, take, this_output_path, versioned

class Colour(Enum):
    RED = {"a", "b"}

class Kind(StrEnum):
    NEW = "new"

class Bits(Flag):
    ONE, TWO, FOUR = 1, 2, 4

@dataclass
class Config:
    words: Any = field(default_factory=lambda: versioned({"train", "infer", "merge", "x", "yy", "zzz"}))
    nested: Any = field(default_factory=lambda: versioned({frozenset(text) for text in ("ab", "bcd", "def", "g")}))
    mapping: Any = field(default_factory=lambda: versioned({word: {word, "z"} for word in {"k1", "k2", "k3", "k4"}}))
    mixed: Any = field(default_factory=lambda: versioned(frozenset([1, "1", None, b"1", (1, "a"), Kind.NEW, 2.5])))
    enums: Any = field(default_factory=lambda: versioned([Colour.RED, Kind.NEW, Bits.ONE | Bits.FOUR, Colour]))
    places: Any = field(default_factory=lambda: versioned([Path("a/b"), PurePosixPath("/c"), date(2026, 1, 2)]))
    numbers: Any = field(default_factory=lambda: versioned((0.1, 1e300, -0.0, float("inf"), 10**30, timedelta(1))))
    inner: Any = None
    free: Any = field(default_factory=lambda: {"free", "of", "versions", Path.cwd()})

def steps():
    first = ExecutorStep("first", None, Config())
    uses = {word: first / word for word in {"a", "b", "c", "d.e"}}
    second = ExecutorStep("second", None, Config(inner=[uses, borrow(first), this_output_path()]))
    return [ExecutorStep("third", None, {"x": take(first), "y": second.nonblocking(), "z": versioned({"q", "r"})})]

def version_strs(prefix):
    executor = Executor(prefix)
    executor.run(steps(), dry_run=True)
    return {step.name: text for step, text in executor.version_strs.items()}

if __name__ == "__main__":
    print(json.dumps(version_strs(sys.argv[1])))
"""


def test_processes_with_other_hash_seeds_prefixes_and_folders_give_the_same_versions(tmp_path: Path):
    script = tmp_path / "experiment.py"
    script.write_text(EXPERIMENT)
    here = runpy.run_path(str(script))["version_strs"]("memory://here")
    running = [
        subprocess.Popen(
            [sys.executable, str(script), f"memory://seed-{seed}"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, folder in (("0", "/"), ("1", tmp_path), ("4242", Path.cwd()))
    ]
    assert [json.loads(process.communicate(timeout=60)[0]) for process in running] == [here] * 3
    assert sorted(here) == ["first", "second", "third"]
