"""M11 with its outputs in a bucket: the same job, over HTTP, against an emulator of Google Cloud Storage."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = ("fetch_model", "prepare_pairs", "train-2", "infer-128", "train-5", "report")


@pytest.fixture
def gcs_environment():
    """The environment of a process whose gs:// paths lead to an emulator on this machine, with a bucket in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from gcp_storage_emulator.__main__ import main; main()"
    flags = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "bucket"]
    emulator = subprocess.Popen(
        [sys.executable, "-c", start, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            assert emulator.poll() is None and time.monotonic() < deadline, "the emulator did not start"
            time.sleep(0.05)
        yield {
            **os.environ,
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            # gcsfs else asks over gRPC what kind of bucket this is, and the emulator speaks none.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        emulator.kill()
        emulator.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run_m11(environment, *flags) -> str:
    command = [sys.executable, str(ROOT / "experiments" / "m11_interleave.py")]
    command += ["--preset", "tiny", "--prefix", "gs://bucket/m11", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def actions(text: str) -> list[str]:
    return [line.split()[1] for step in STEPS for line in text.splitlines() if line.split()[:1] == [step]]


def test_a_job_writes_to_a_bucket_and_finds_its_steps_there(gcs_environment):
    assert set(actions(run_m11(gcs_environment, "--dry_run"))) == {"RUN"}
    first = run_m11(gcs_environment)
    assert first.splitlines()[-1] == "Job finished with no error."
    assert "gs://bucket/m11/train-5-" in first
    assert actions(run_m11(gcs_environment, "--dry_run")) == ["SKIP"] * len(STEPS)
