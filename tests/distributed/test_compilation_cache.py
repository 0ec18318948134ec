"""Jobs that share a cache compile a program once, and a broken cache never fails a job."""

import dataclasses
import logging
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import distributed as jax_distributed

from simpo_pipeline.distributed.compilation_cache import CompilationCache, opened_cache
from simpo_pipeline.distributed.config import compilation_cache_path
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.storage.paths import user_cache_folder

TOY = "tests/distributed/toy_job.py"
X = jax.ShapeDtypeStruct((8,), jnp.float32)
SUMMARY = re.compile(r"compilation cache: read (\d+).* and compiled (\d+) ")


def run_job(path: str, num_programs: int = 3) -> tuple[CompilationCache, list[float]]:
    """Compile programs through the cache and run them, as a new process does. Return the cache and the results."""
    with opened_cache(path) as cache:
        assert cache is not None
        programs = Programs(cache=cache)
        made = [
            programs.compile(f"scale_{number}", lambda x, factor=number: x * np.float32(factor + 2) + x.sum(), X)
            for number in range(num_programs)
        ]
        x = np.ones(8, np.float32)
        return cache, [float(np.asarray(program(x))[0]) for program in made]


EXPECTED = [10.0, 11.0, 12.0]


def test_a_second_job_compiles_nothing(tmp_path):
    first, results = run_job(str(tmp_path))
    assert (first.counts.hits, first.counts.misses, results) == (0, 3, EXPECTED)
    second, results = run_job(str(tmp_path))
    assert (second.counts.hits, second.counts.misses, results) == (3, 0, EXPECTED)
    assert SUMMARY.search(second.summary()) and str(tmp_path) in second.summary()


@pytest.mark.parametrize("damage", [lambda entry: entry[: len(entry) // 2], lambda entry: b"", lambda entry: b"x" * 99])
def test_a_damaged_entry_is_compiled_again_and_replaced_with_one_warning(tmp_path, damage, caplog):
    run_job(str(tmp_path))
    entries = sorted(tmp_path.glob("*-cache"))
    assert len(entries) == 3
    whole = entries[0].read_bytes()
    entries[0].write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        cache, results = run_job(str(tmp_path))
    assert (cache.counts.hits, cache.counts.misses, results) == (2, 1, EXPECTED)
    (warning,) = caplog.messages
    assert str(entries[0]) in warning and "damaged" in warning
    caplog.clear()
    again, _ = run_job(str(tmp_path))
    assert again.counts.misses == 0 and caplog.messages == []


@pytest.fixture
def process_1(monkeypatch):
    """Make JAX treat this process as process 1, for which JAX writes no cache entries."""
    monkeypatch.setattr(jax_distributed.global_state, "process_id", 1)
    monkeypatch.setattr(jax, "process_index", lambda: 1)


def test_a_process_for_which_jax_writes_no_entries_stores_its_own(tmp_path, process_1):
    assert run_job(str(tmp_path))[0].counts.misses == 3
    again, results = run_job(str(tmp_path))
    assert (again.counts.hits, again.counts.misses, results) == (3, 0, EXPECTED)


def test_no_program_is_stored_under_the_key_of_another(tmp_path, process_1):
    """A compilation outside `Programs` leaves a missed key. The next program must not be stored under that key."""
    run_job(str(tmp_path))
    names = {entry.name for entry in tmp_path.glob("*-cache")}
    with opened_cache(str(tmp_path)) as cache:
        jax.jit(lambda x: x * 5).lower(X).compile()
        Programs(cache=cache).compile("scale_0", lambda x, factor=0: x * np.float32(factor + 2) + x.sum(), X)
    assert {entry.name for entry in tmp_path.glob("*-cache")} == names


def test_a_program_that_calls_back_into_python_is_not_stored(tmp_path, process_1):
    def shown(x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda value: None, x)
        return x + 1

    with opened_cache(str(tmp_path)) as cache:
        Programs(cache=cache).compile("shown", shown, X)
    assert list(tmp_path.glob("*-cache")) == []


def test_an_intact_entry_that_is_not_an_executable_gives_a_warning(tmp_path):
    run_job(str(tmp_path), 1)
    (entry,) = tmp_path.glob("*-cache")
    from jax._src.compilation_cache import compress_executable

    entry.write_bytes(compress_executable(b"\0\0\0\1 no executable"))
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        _, results = run_job(str(tmp_path), 1)
    assert results == EXPECTED[:1]


def test_an_unusable_cache_path_gives_one_warning_and_no_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        cache, results = run_job(str(tmp_path / "file" / "cache"))
    assert results == EXPECTED and cache.counts.misses == 3
    (warning,) = caplog.messages
    assert str(tmp_path / "file") in warning and "--compilation_cache" in warning


def test_entries_can_be_stored_in_a_bucket(gcs_here, caplog):
    run_job(gcs_here)
    cache, results = run_job(gcs_here)
    assert (cache.counts.hits, cache.counts.misses, results) == (3, 0, EXPECTED)
    assert [message for message in caplog.messages if "compilation cache" in message] == []


def test_the_config_of_jax_is_restored(tmp_path):
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [jax.config.values[name] for name in names]
    with opened_cache(None):
        assert not jax.config.values["jax_enable_compilation_cache"]
    with opened_cache(str(tmp_path)):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
    assert [jax.config.values[name] for name in names] == before


def test_off_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with opened_cache(None) as cache:
        assert cache is None
        Programs(cache=cache).compile("twice", lambda x: x * 2, X)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("off", {"JAX_COMPILATION_CACHE_DIR": "/theirs"}, None),
        ("gs://bucket/compiled/", {"JAX_COMPILATION_CACHE_DIR": "/theirs"}, "gs://bucket/compiled"),
        ("/ours", {}, "/ours"),
        (None, {"JAX_COMPILATION_CACHE_DIR": "/theirs"}, "/theirs"),
        (None, {}, user_cache_folder("compiled")),
    ],
)
def test_the_flag_precedes_the_variable_of_jax_which_precedes_the_user_folder(given, environment, expected):
    assert compilation_cache_path(given, environment) == expected


@pytest.mark.parametrize("given", ["", " ", "gs:/bucket/compiled"])
def test_an_invalid_cache_path_is_refused(given):
    with pytest.raises(ConfigError, match=r"give a folder|lost a slash"):
        compilation_cache_path(given, {})


@dataclasses.dataclass(frozen=True)
class ToyRun:
    """Cache statistics that a job of two processes reports."""

    read: int
    compiled: int
    ledgers: set[str]
    text: str

    def lines(self, pattern: str) -> list[tuple[str, ...]]:
        """Return the process and the groups of each logged line that matches."""
        return re.findall(rf"^\[(\d)\] .*INFO {pattern}", self.text, re.MULTILINE)


def run_toy(launch, prefix: pathlib.Path, cache: pathlib.Path) -> ToyRun:
    text = launch(2, TOY, "--prefix", prefix, "--compilation_cache", cache).require_success().text
    ((read, compiled),) = SUMMARY.findall(text)
    return ToyRun(int(read), int(compiled), set(re.findall(r"\(ledger (\w+)\)", text)), text)


@pytest.fixture(scope="module")
def first_run(launch, tmp_path_factory) -> tuple[ToyRun, pathlib.Path]:
    """Run a job with an empty cache, and return it with the folder of the cache that it filled."""
    folder = tmp_path_factory.mktemp("toy")
    return run_toy(launch, folder / "first", folder / "cache"), folder / "cache"


def test_processes_read_the_programs_they_compiled_and_their_ledgers_stay_equal(launch, first_run, tmp_path):
    first, cache = first_run
    assert first.read == 0 and first.compiled > 0 and len(first.ledgers) == 1
    again = run_toy(launch, tmp_path / "again", cache)
    assert (again.read, again.compiled, again.ledgers) == (first.compiled, 0, first.ledgers)
    assert again.lines(r"compiled (\w+) in") == []


def test_all_processes_read_a_shared_program_or_all_compile_it(launch, first_run, tmp_path):
    """Each process has its own entries. If one of the two is missing, both processes compile the shared program."""
    first, cache = first_run
    num_entries = len(list(cache.glob("*-cache")))
    recompiling = set()
    for lacking in (0, 1):
        for name in ("update", "other_update", "generate"):
            sorted(cache.glob(f"jit_{name}-*-cache"))[lacking].unlink()
        run = run_toy(launch, tmp_path / f"without_{lacking}", cache)
        assert run.compiled >= 2 and run.read + run.compiled == first.compiled
        lines = run.lines(r"compiling (\w+) here too, because process (\d) did not")
        assert sorted(name for _, name, _ in lines) == ["other_update", "update"]
        assert all(host != missing for host, _, missing in lines)
        both = [(host, name) for host in "01" for name in ("other_update", "update")]
        assert sorted(run.lines(r"compiled (\w*update) in")) == both
        recompiling |= {(host, name) for host, name, _ in lines}
        assert run.ledgers == first.ledgers
        assert len(list(cache.glob("*-cache"))) == num_entries
    assert sorted(recompiling) == both
