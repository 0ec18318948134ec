"""Strict JAX for every test: no silent dtype promotion, no silent broadcasting across ranks, CPU only."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class FinishedJob:
    """A job of many processes, after its end."""

    exit_code: int
    text: str
    ended: float
    """When its last process was gone, by time.time()."""

    def lines(self, host: int) -> list[str]:
        """What one process printed."""
        mark = f"[{host}] "
        return [line.removeprefix(mark) for line in self.text.splitlines() if line.startswith(mark)]

    def require_success(self) -> "FinishedJob":
        """Fails the test if the job failed."""
        assert self.exit_code == 0, self.text
        assert self.text.splitlines()[-1] == "Job finished with no error."
        return self


@pytest.fixture(scope="session")
def launch():
    """Runs a script in many real processes of one job, through the project's own launcher."""

    def run(num_processes: int, script: str, *words: object, devices: int = 2, timeout: float = 240) -> FinishedJob:
        command = [sys.executable, str(ROOT / "infra" / "launch.py"), "--local", str(num_processes)]
        command += ["--devices_per_host", str(devices), "--", sys.executable, str(ROOT / script)]
        done = subprocess.run(
            [*command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return FinishedJob(done.returncode, done.stdout, time.time())

    return run
