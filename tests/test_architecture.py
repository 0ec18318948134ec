"""Tests of the layout in ARCHITECTURE.md: imports go one way, and planning imports no heavy package."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "simpo_pipeline"

# From top to bottom. A room imports only from rows below its own. Rooms in one row never import each other.
ROWS = (
    {"experiments", "benchmarks"},
    {"steps"},
    {"job"},
    {"training", "inference", "handoff", "preflight"},
    {"model", "data"},
    {"ops"},
    {"distributed", "tracking", "executor"},
    {"storage"},
    {"config_files", "processes"},
    {"errors"},
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
# Rooms and top-level files of the executor, leaves first. Each may import from the rows before its own
# and from the first row.
EXECUTOR_ROWS = (
    {"step", "run", "table"},
    {"records"},
    {"planning"},
    {"running"},
    {"executor", "output"},
    {"commands", "arguments"},
    {"main"},
    {"__init__", "__main__"},
)
HEAVY = ("jax", "equinox", "haliax", "optax")
# Rooms for planning, storage and tracking, which a machine without JAX could use.
LIGHT_ROOMS = ("executor", "storage", "tracking", "data", "config_files")


def python_files():
    for folder in (PACKAGE, ROOT / "steps", ROOT / "experiments", ROOT / "benchmarks"):
        yield from sorted(folder.rglob("*.py"))


def room_of_file(path: pathlib.Path) -> str | None:
    relative = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.relative_to(ROOT)
    room = relative.parts[0].removesuffix(".py")
    return None if room == "__init__" else room


def room_of_module(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "simpo_pipeline":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ROW_OF else None


def imported_modules(path: pathlib.Path, *, top_level_only: bool = False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; use the full module name"
            yield node.module or "", node.lineno


def test_every_room_has_a_row():
    rooms = {room for path in python_files() if (room := room_of_file(path)) is not None}
    assert rooms <= set(ROW_OF), f"rooms that are missing from the import order: {sorted(rooms - set(ROW_OF))}"


def test_imports_go_one_way():
    wrong = []
    for path in python_files():
        room = room_of_file(path)
        for module, line in imported_modules(path):
            target = room_of_module(module)
            if room is not None and target is not None and target != room and ROW_OF[target] <= ROW_OF[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_rooms_of_the_executor_import_one_way():
    row_of = {room: row for row, rooms in enumerate(EXECUTOR_ROWS) for room in rooms}
    wrong = []
    for path in sorted((PACKAGE / "executor").rglob("*.py")):
        room = path.relative_to(PACKAGE / "executor").parts[0].removesuffix(".py")
        for module, line in imported_modules(path):
            if module.startswith("simpo_pipeline.executor."):
                target = module.split(".")[2]
                if target != room and row_of[target] >= row_of[room] and row_of[target] > 0:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_library_never_imports_infra_or_tests():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in python_files()
        for module, line in imported_modules(path)
        if module.split(".")[0] in ("infra", "tests")
    ]
    assert not wrong, "\n".join(wrong)


def test_light_rooms_and_configs_import_no_jax():
    light = [path for room in LIGHT_ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]
    light += sorted(PACKAGE.rglob("config.py"))
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in light
        for module, line in imported_modules(path)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_steps_and_experiments_import_no_jax_before_a_step_runs():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {module} at import time"
        for folder in ("steps", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.parent != ROOT / "steps" / "bodies"  # imported when their steps run
        for module, line in imported_modules(path, top_level_only=True)
        if module.split(".")[0] in (*HEAVY, "bodies") or module.startswith("steps.bodies")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["simpo_pipeline.job.main", "steps.train", "steps.infer", "steps.report"])
def test_modules_imported_for_planning_do_not_import_jax(module):
    slow = (*HEAVY, "transformers", "wandb")
    code = f"import sys, {module}; print([name for name in {slow!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_pickles_or_builds_shell_strings():
    wrong = []
    for path in [*python_files(), *sorted((ROOT / "infra").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                wrong.append(f"{path.relative_to(ROOT)}:{node.value.lineno}: shell=")
        modules = {module.split(".")[0] for module, _ in imported_modules(path)}
        wrong += [f"{path.relative_to(ROOT)}: imports {m}" for m in modules & {"pickle", "cloudpickle", "dill"}]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("block", "rows"), [("rooms", ROWS), ("executor", EXECUTOR_ROWS)])
def test_the_architecture_page_shows_the_rows(block, rows):
    page = (ROOT / "ARCHITECTURE.md").read_text()
    (text,) = re.findall(rf"^```{block}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    # Two spaces separate the rooms of a row from their descriptions.
    shown = [set(re.split(r" {2,}", line)[0].split(" | ")) for line in text.splitlines()]
    assert shown == list(rows)
