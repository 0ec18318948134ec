"""Strict JAX for every test: no silent dtype promotion, no silent broadcasting across ranks, CPU only."""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from types import ModuleType

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# gcsfs else asks over gRPC what kind of bucket this is, which no server of the tests answers; read at its first import.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """One run of pytest compiles equal programs once: its workers, and the jobs that tests start, share a folder."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # jax has found it in the environment
    folder = tempfile.mkdtemp(prefix="simpo_pipeline_compiled_")
    config.add_cleanup(lambda: shutil.rmtree(folder))
    for name, value in (("jax_compilation_cache_dir", folder), ("jax_persistent_cache_min_compile_time_secs", 0.2)):
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test wrote may hold halves of surrogate pairs, which would end its worker on the way to the others."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


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


def _load(path: pathlib.Path) -> ModuleType:
    """A module beside the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(f"tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gcs():
    """A server of Google Cloud Storage with the bucket `bucket`, shared by all tests: each uses a prefix of its own."""
    with _load(ROOT / "tests" / "gcs" / "client.py").GcsServer() as server:
        yield server


@pytest.fixture
def gcs_here(gcs, monkeypatch: pytest.MonkeyPatch):
    """Lets gs:// paths of this process lead to that server; a prefix of one test's own there."""
    import gcsfs

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield f"gs://bucket/{uuid.uuid4().hex}"
    gcs.no_faults()
    gcs.stop_at()
    for filesystem in list(gcsfs.GCSFileSystem._cache.values()):
        if filesystem._session is not None:
            filesystem.close_session(filesystem.loop, filesystem._session)
    gcsfs.GCSFileSystem.clear_instance_cache()
