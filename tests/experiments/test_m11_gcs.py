"""M11 with its outputs in a bucket: the same job, over HTTP, against a Google Cloud Storage server."""

import json
import pathlib
import subprocess
import threading
import uuid
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = ("fetch_model", "prepare_pairs", "train-2", "infer-128", "train-5", "report")
FAULTS = ["429", "500", "503", "cut_before", "cut_after", "delete_lost"]
# These contain times or their own paths, besides the results of training and generation.
NOT_COMPARED = ("metrics.jsonl", "summary.json", "report.json", "report.md", "report.html", "run.json")


def run_m11(python: list[str], gcs: Any, name: str, *flags: str) -> str:
    command = [*python, str(ROOT / "experiments" / "m11_interleave.py")]
    command += ["--preset", "tiny", "--prefix", f"gs://bucket/{name}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=gcs.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def actions(text: str) -> list[str]:
    return [line.split()[1] for step in STEPS for line in text.splitlines() if line.split()[:1] == [step]]


def committed(gcs: Any, name: str) -> dict[str, str]:
    """Return the checksum of each output of each step with SUCCESS; fail if one differs from its manifest."""
    statuses = [path for path in gcs.objects(f"{name}/") if path.endswith("/.executor_status")]
    done = [path.removesuffix("/.executor_status") for path in statuses if gcs.read(path) == b"SUCCESS"]
    found: dict[str, str] = {}
    for folder in done:
        listed = json.loads(gcs.read(f"{folder}/manifest.json"))["files"]
        objects = gcs.objects(f"{folder}/")
        for file in listed:
            assert objects[f"{folder}/{file['path']}"]["crc32c"] == file["crc32c"], (folder, file)
            found[f"{folder.removeprefix(name)}/{file['path']}"] = file["crc32c"]
    return found


@pytest.mark.slow
def test_with_faults_in_5_percent_of_requests_outputs_are_the_same_and_never_partial(python, gcs):
    clean, faulty = uuid.uuid4().hex, uuid.uuid4().hex
    assert set(actions(run_m11(python, gcs, clean, "--dry_run"))) == {"RUN"}
    assert f"gs://bucket/{clean}/train-5-" in run_m11(python, gcs, clean)
    assert actions(run_m11(python, gcs, clean, "--dry_run")) == ["SKIP"] * len(STEPS)
    expected = committed(gcs, clean)
    assert len(expected) > len(STEPS)
    gcs.reset_log()
    gcs.faults(seed=4, rate=0.05, kinds=FAULTS, match=faulty)
    ended = threading.Event()
    looks: list[int] = []

    def look_until_ended() -> None:
        while not ended.wait(0.05):
            looks.append(len(committed(gcs, faulty)))

    reader = threading.Thread(target=look_until_ended)
    reader.start()
    try:
        text = run_m11(python, gcs, faulty)
    finally:
        ended.set()
        reader.join()
        gcs.no_faults()
    assert text.splitlines()[-1] == "Job finished with no error."
    faults = [entry["fault"] for entry in gcs.log() if entry["fault"]]
    print(f"{len(faults)} faults in {len(gcs.log())} requests: {sorted(faults)}")
    assert len(faults) >= 5
    assert {0, len(expected)} <= {looks[0], len(committed(gcs, faulty))}
    assert same(committed(gcs, faulty)) == same(expected)


def same(outputs: dict[str, str]) -> dict[str, str]:
    return {path: checksum for path, checksum in outputs.items() if not path.endswith(NOT_COMPARED)}
