"""The table of faults in `mutants.py` fits the code. Whether the tests catch the faults is checked by hand."""

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


def test_every_mutant_applies_to_the_current_code():
    problems = mutants.find_problems(mutants.ROOT)
    assert not problems, "\n".join(problems)


def test_the_table_of_results_has_a_row_for_each_mutant():
    rows = (mutants.ROOT / "docs" / "mutants.md").read_text().splitlines()
    listed = [tuple(row.split(" | ")[:2]) for row in rows if row.startswith("| ") and not row.startswith("| fault")]
    assert listed == [(f"| {mutant.name.replace('-', ' ')}", f"`{mutant.file}`") for mutant in mutants.MUTANTS]


def test_there_are_many_mutants_and_every_room_has_one():
    assert len(mutants.MUTANTS) >= 40
    assert {mutant.room for mutant in mutants.MUTANTS} == set(mutants.ROOMS)
