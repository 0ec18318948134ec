"""The persistent compilation cache: executables that outlive the process that compiled them.

jax decides what identifies an executable (program, options, versions, devices) and what an entry contains. This module
decides where entries are stored and what happens when storage fails:

- An entry is written in one piece, locally or on `gs://`, so a killed job leaves no partial entry behind.
- A damaged entry is removed and compiled again. Storage that cannot be read or written costs one warning, never a job.
- Every process of a job writes what it compiled. jax itself writes in process 0 only, and the programs that another
  host runs on its own devices would be compiled again in every job.
- On CPUs, all processes load a program that spans them or all compile it. `Programs` sees to that.

An entry is code that jax loads, so anybody who can write to the folder can run code in the job. jax keeps its interface
for caches private; this file alone imports it, and `tests/distributed/test_compilation_cache.py` notices when it moves.
"""

import dataclasses
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import jax
from jax._src import compilation_cache as jax_cache
from jax._src.compilation_cache_interface import CacheInterface

from simpo_pipeline.errors import PathNotFoundError, StorageError
from simpo_pipeline.storage.files import read_bytes, remove_tree, write_bytes
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme

logger = logging.getLogger(__name__)

# jax's own names of files, so that a folder can be shared with programs that use jax's cache directly.
_SUFFIX = "-cache"
_MIN_COMPILE_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"
_SECONDS_SAVED = "/jax/compilation_cache/compile_time_saved_sec"


@dataclasses.dataclass
class CacheCounts:
    """Counts since the cache was opened."""

    requests: int = 0
    """Programs that were asked for."""
    hits: int = 0
    """Programs that were read instead of compiled."""
    seconds_saved: float = 0.0
    """Compile time of the hits minus the time to read them. jax records whole seconds of it, rounded down."""

    @property
    def misses(self) -> int:
        """Programs that had to be compiled."""
        return self.requests - self.hits


class CompilationCache(CacheInterface):
    """Entries of jax's compilation cache in one folder. `opened_cache` makes one and connects it to jax."""

    def __init__(self, path: str) -> None:
        self._path = pathlib.Path(path)  # jax shows it in its own log
        self.path = path
        self.counts = CacheCounts()
        self._has_failed = False
        # The last request of each thread: its key if jax stored nothing for it, and what came of it.
        self._last = threading.local()

    def get(self, key: str) -> bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the entry of a key; None if there is none that can be used."""
        self._last.key = key
        return self._read(key)

    def put(self, key: str, value: bytes) -> None:
        """Store an entry, over what is there."""
        self._last.key = None
        if self._has_failed:
            return
        try:
            write_bytes(self._file(key), value)
        except StorageError as error:
            self._give_up(error)

    def compile(
        self, name: str, compile_it: Callable[[], jax.stages.Compiled], *, has_callbacks: bool
    ) -> tuple[jax.stages.Compiled, bool]:
        """Compile one program through the cache. Return the executable and whether it was a hit.

        Process 0 leaves storing to jax. Every other process stores what it compiled by jax's rules: no program that
        calls back into Python, whose pointers mean nothing to another process, and none that compiled too fast.

        Args:
            name: The program's name, for jax's log.
            compile_it: Compiles the program with jax, which asks this cache first.
            has_callbacks: Whether the program calls back into Python.
        """
        # The last request in this thread is another program's.
        self._last.key, self._last.is_hit, self._last.seconds_saved = None, False, 0.0
        start = time.perf_counter()
        compiled = compile_it()
        seconds = time.perf_counter() - start
        is_hit, key, executable = self._last.is_hit, self._last.key, compiled.runtime_executable()
        is_wanted = not is_hit and not has_callbacks and seconds >= jax.config.values[_MIN_COMPILE_SECONDS]
        if (
            is_wanted
            and key is not None
            and executable is not None
            and jax.process_index() > 0
            and not self._has_failed
        ):
            backend = jax.local_devices()[0].client
            jax_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
        return compiled, is_hit

    def count_last_as_miss(self) -> None:
        """Count the hit that `compile` returned last in this thread as a miss: the program is compiled after all."""
        self.counts.hits -= 1
        self.counts.seconds_saved -= self._last.seconds_saved

    def count(self, event: str, seconds: float = 0.0) -> None:
        """Count one of jax's events; jax reports each in the thread that compiles."""
        if event == _REQUEST:
            self.counts.requests += 1
        elif event == _HIT:
            self.counts.hits += 1
            self._last.is_hit = True
        elif event == _SECONDS_SAVED:
            self._last.seconds_saved = max(0.0, seconds)
            self.counts.seconds_saved += self._last.seconds_saved

    def summary(self) -> str:
        """One line of what the cache did so far."""
        found = self.counts
        read = (
            f"read {found.hits} programs, which saved at least {found.seconds_saved:.1f} s" if found.hits else "read 0"
        )
        return f"compilation cache: {read}, and compiled {found.misses} ({self.path})"

    def _read(self, key: str) -> bytes | None:
        if self._has_failed:
            return None
        path = self._file(key)
        try:
            entry = read_bytes(path)
        except PathNotFoundError:
            return None
        except StorageError as error:
            self._give_up(error)
            return None
        try:
            jax_cache.decompress_executable(entry)
        except Exception as error:  # zlib's or zstd's own, whichever jax uses here
            logger.warning("compilation cache: %s is damaged (%s); it is compiled again", path, error)
            self._remove(path)
            return None
        return entry

    def _remove(self, path: str) -> None:
        try:
            remove_tree(path)
        except StorageError as error:
            self._give_up(error)

    def _give_up(self, error: StorageError) -> None:
        self._has_failed = True
        logger.warning(
            "compilation cache: %s The job continues without it; --compilation_cache chooses another place", error
        )

    def _file(self, key: str) -> str:
        return join(self.path, f"{key}{_SUFFIX}")


@contextmanager
def opened_cache(path: str | None) -> Generator[CompilationCache | None]:
    """Connect jax to the cache at `path` while the block runs; None disables caching.

    Programs of any compile time are stored, unless `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says otherwise.
    """
    cache = None if path is None else CompilationCache(path)
    settings = {"jax_enable_compilation_cache": cache is not None and jax.config.values["jax_enable_compilation_cache"]}
    if cache is not None and _MIN_COMPILE_SECONDS.upper() not in os.environ:
        settings[_MIN_COMPILE_SECONDS] = 0
    if path is not None and is_local(path):
        # XLA keeps results of autotuning on GPUs in a local folder below it.
        settings["jax_compilation_cache_dir"] = strip_file_scheme(path)
        _make_private(strip_file_scheme(path))
    before = {name: jax.config.values[name] for name in settings}
    jax_cache_before = jax_cache._cache

    def count(event: str, **_: str | int) -> None:
        if cache is not None:
            cache.count(event)

    def count_seconds(event: str, duration_secs: float, **_: str | int) -> None:
        if cache is not None:
            cache.count(event, duration_secs)

    for name, value in settings.items():
        jax.config.update(name, value)
    _connect(cache)
    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_event_duration_secs_listener(count_seconds)
    try:
        yield cache
    finally:
        jax.monitoring.unregister_event_listener(count)
        jax.monitoring.unregister_event_duration_listener(count_seconds)
        for name, value in before.items():
            jax.config.update(name, value)
        _connect(jax_cache_before)


def _connect(cache: CacheInterface | None) -> None:
    """Let jax read and write through `cache`; None lets it open its own at the next compilation, if it is to."""
    jax_cache.reset_cache()
    jax_cache._cache = cache
    jax_cache._cache_initialized = cache is not None


def _make_private(folder: str) -> None:
    """Create a folder that no other user can write to. A failure comes up again at the first write, with a warning."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        logger.debug("cannot create %s: %s", folder, error)
