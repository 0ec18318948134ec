"""Planning of 10,000 steps: the cost of a dry run before anything runs, and the cost of importing the executor.

    uv run python benchmarks/planning.py           # about 40 seconds on 2 cores

A chain, a fan-out with a join, and a ladder of diamonds are each planned on a local prefix where nothing ever ran, and
on one where every step is done (status, manifest, record and one output each). The results are medians of `ROUNDS`,
all in one run. It prints a table and one JSON line, and writes benchmarks/results/planning.json.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from result_files import write_result

from simpo_pipeline.executor import Executor, ExecutorStep, this_output_path, versioned
from simpo_pipeline.executor.records.status import find_outputs, manifest_bytes

STEPS = 10_000
ROUNDS = 5
IMPORT = "import time; start = time.perf_counter(); import simpo_pipeline.executor; print(time.perf_counter() - start)"


def do_nothing(config: Any) -> None:
    """Do nothing; this is never called, because steps are only planned here."""


def step(name: str, *uses: Any) -> ExecutorStep:
    """Return a step with a versioned value, its own output path and the paths of others in its config."""
    return ExecutorStep(name, do_nothing, {"value": versioned(name), "out": this_output_path(), "uses": uses})


def chain() -> ExecutorStep:
    """Return the last step of a chain, in which each step uses the previous one."""
    last = step("chain-0")
    for number in range(1, STEPS):
        last = step(f"chain-{number}", last / "data")
    return last


def fan_out() -> ExecutorStep:
    """Return a step that joins all others, which use one root step."""
    root = step("root")
    return step("join", *(step(f"fan-{number}", root) for number in range(STEPS - 2)))


def diamonds() -> ExecutorStep:
    """Return the last joint of a ladder: two steps use each joint, and the next joint uses both."""
    joint = step("joint-0")
    for number in range(1, (STEPS + 2) // 3):
        joint = step(f"joint-{number}", step(f"left-{number}", joint), step(f"right-{number}", joint))
    return joint


def plan_seconds(prefix: str, last: ExecutorStep) -> tuple[float, Executor]:
    """Return the wall seconds of one dry run, and its executor."""
    start = time.perf_counter()
    executor = Executor(prefix)
    executor.run([last], dry_run=True)
    return time.perf_counter() - start, executor


def leave_outputs(executor: Executor) -> None:
    """Make every step of the plan look as if it had run."""
    for path in map(pathlib.Path, set(executor.output_paths.values())):
        path.mkdir(parents=True)
        (path / "rows.jsonl").write_text("{}\n")
        (path / "manifest.json").write_bytes(manifest_bytes(find_outputs(str(path))))
        (path / ".executor_info").write_text("{}")
        (path / ".executor_status").write_text("SUCCESS")


def import_seconds() -> float:
    """Return the seconds of the import in a fresh process."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure, then print."""
    figures = {"import simpo_pipeline.executor": statistics.median(import_seconds() for _ in range(ROUNDS))}
    for make in (chain, fan_out, diamonds):
        last = make()
        with tempfile.TemporaryDirectory() as prefix:
            for state in ("nothing ran", "all done"):
                runs = [plan_seconds(prefix, last) for _ in range(ROUNDS)]
                executor = runs[-1][1]
                figures[f"{make.__name__}, {state}"] = statistics.median(seconds for seconds, _ in runs)
                actions = {row.action.value for row in executor.plan}
                assert actions == ({"RUN"} if state == "nothing ran" else {"SKIP"}), actions
                if state == "nothing ran":
                    assert len(executor.plan) in range(STEPS - 2, STEPS + 1), len(executor.plan)
                    leave_outputs(executor)
    print("| seconds, median of", ROUNDS, "| |\n|---|---|")
    for name, seconds in figures.items():
        print(f"| {name} | {seconds:.2f} |")
    print(json.dumps(figures))
    write_result("planning", figures)


if __name__ == "__main__":
    main()
