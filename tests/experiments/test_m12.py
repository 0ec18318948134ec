"""M12 on `tiny`: 20 updates with generation after every 5, in one process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STOPS = (5, 10, 15, 20)
NUM_PROMPTS = 16


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("m12")


@pytest.fixture(scope="module")
def printed(prefix, unoptimised) -> str:
    script = pathlib.Path(__file__).with_name("m12_with_memory.py")
    command, environment = [sys.executable, str(script), "--prefix", str(prefix)], os.environ | unoptimised
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("preset", ["tiny", "llama3_8b_v5p_32"])
def test_a_dry_run_prints_the_plan_and_touches_nothing(preset, tmp_path):
    words = ["--preset", preset, "--prefix", str(tmp_path), "--dry_run", "--export", "bf16"]
    command = [sys.executable, "experiments/m12_periodic.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert len([step for step in steps if step.startswith("train-")]) == 4
    assert len([step for step in steps if step.startswith("infer-")]) == 4
    assert steps.count("export") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_generation_runs_after_every_period_including_once_after_the_last_update(printed, prefix):
    assert printed.splitlines()[-1] == "Job finished with no error."
    for stop in STOPS:
        (folder,) = prefix.glob(f"infer-{NUM_PROMPTS}-to-{stop}-*")
        rows = [json.loads(line) for file in folder.glob("all_hosts_*.jsonl") for line in file.read_text().splitlines()]
        assert len(rows) == NUM_PROMPTS
        assert {row["step"] for row in rows} == {stop}
    assert len(list(prefix.glob("infer-*"))) == len(STOPS)
    steps = [
        json.loads(line)["step"]
        for stop in STOPS
        for line in next(prefix.glob(f"train-5-to-{stop}-*")).joinpath("metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 21))


@pytest.mark.slow
def test_memory_is_flat_over_the_periods(printed):
    lines = [line.split() for line in printed.splitlines() if line.startswith("MEMORY")]
    assert tuple(int(stop) for _, stop, _, _ in lines) == STOPS
    resident, on_devices = zip(*((int(resident), int(held)) for _, _, resident, held in lines), strict=True)
    assert len(set(on_devices)) == 1, "arrays of a period outlive it"
    # The first period compiles; later periods leave nothing behind except the allocator's slack.
    assert max(resident[1:]) < 1.05 * resident[1]
