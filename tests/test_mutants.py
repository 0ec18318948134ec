"""The table of faults in `mutants.py` still fits the code; whether the tests catch them is found by hand."""

import importlib.util
import pathlib

PATH = pathlib.Path(__file__).with_name("mutants.py")


def _load():
    spec = importlib.util.spec_from_file_location("tests_mutants", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutants = _load()


def test_every_mutant_applies_to_the_code_as_it_is():
    problems = mutants.find_problems(mutants.ROOT)
    assert not problems, "\n".join(problems)


def test_the_table_of_results_has_a_row_for_each():
    rows = (mutants.ROOT / "docs" / "mutants.md").read_text().splitlines()
    told = [tuple(row.split(" | ")[:2]) for row in rows if row.startswith("| ") and not row.startswith("| fault")]
    assert told == [(f"| {mutant.name.replace('-', ' ')}", f"`{mutant.file}`") for mutant in mutants.MUTANTS]


def test_there_are_many_and_every_room_has_one():
    assert len(mutants.MUTANTS) >= 40
    assert {mutant.room for mutant in mutants.MUTANTS} == set(mutants.ROOMS)
