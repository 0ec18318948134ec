"""The persistent compilation cache: executables that outlive the process that compiled them.

jax decides what identifies an executable (program, options, versions, devices) and what an entry contains. This module
decides where entries are stored and how storage failures are handled:

- An entry is written in one piece, locally or on `gs://`, so a killed job leaves no partial entry.
- A damaged entry is removed and its program is recompiled. Storage that cannot be read or written causes one warning
  and never fails a job.
- Every process of a job writes the programs that it compiled. jax itself writes only in process 0, so the programs that
  another host runs on its own devices would be recompiled in every job.
- On CPUs, either all processes load a program that spans them or all processes compile it. `Programs` enforces this.

An entry is code that jax loads, so anyone who can write to the folder can run code in the job. jax's cache interface is
private. Only this file imports it, and `tests/distributed/test_compilation_cache.py` fails when the interface moves.
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

# jax's own file name suffix, so that programs that use jax's cache directly can share the folder.
_SUFFIX = "-cache"
_MIN_COMPILE_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"
_SECONDS_SAVED = "/jax/compilation_cache/compile_time_saved_sec"


@dataclasses.dataclass
class CacheCounts:
    """Counters since the cache was opened."""

    requests: int = 0
    """Number of programs requested."""
    hits: int = 0
    """Number of programs read from the cache instead of compiled."""
    seconds_saved: float = 0.0
    """Compile time of the hits minus the time to read them. jax rounds compile times down to whole seconds."""

    @property
    def misses(self) -> int:
        """Number of programs that had to be compiled."""
        return self.requests - self.hits


class CompilationCache(CacheInterface):
    """A store for jax's compilation cache in one folder. `opened_cache` creates one and connects it to jax."""

    def __init__(self, path: str) -> None:
        self._path = pathlib.Path(path)  # jax shows this attribute in its log
        self.path = path
        self.counts = CacheCounts()
        self._has_failed = False
        # The last request of each thread: its key if jax stored nothing for it, and its outcome.
        self._last = threading.local()

    def get(self, key: str) -> bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the entry of a key, or None if there is no usable entry."""
        self._last.key = key
        return self._read(key)

    def put(self, key: str, value: bytes) -> None:
        """Store an entry, replacing any earlier one."""
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

        In process 0, jax stores the executable. Every other process stores the programs that it compiled, by jax's
        rules. It skips programs that call back into Python, whose pointers are invalid in another process, and programs
        that compiled faster than jax's minimum compile time.

        Args:
            name: The program's name, for jax's log.
            compile_it: Compiles the program with jax. jax queries this cache first.
            has_callbacks: Whether the program calls back into Python.
        """
        # Clear the last request of this thread, which was for another program.
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
        """Turn the last hit of `compile` in this thread into a miss, because the program is compiled after all."""
        self.counts.hits -= 1
        self.counts.seconds_saved -= self._last.seconds_saved

    def count(self, event: str, seconds: float = 0.0) -> None:
        """Count one monitoring event of jax. jax reports each event in the thread that compiles."""
        if event == _REQUEST:
            self.counts.requests += 1
        elif event == _HIT:
            self.counts.hits += 1
            self._last.is_hit = True
        elif event == _SECONDS_SAVED:
            self._last.seconds_saved = max(0.0, seconds)
            self.counts.seconds_saved += self._last.seconds_saved

    def summary(self) -> str:
        """Return a one-line summary of the cache's activity so far."""
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
        except Exception as error:  # raised by zlib or zstd, whichever jax uses here
            logger.warning("compilation cache: %s is damaged (%s); its program is recompiled", path, error)
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
            "compilation cache: %s The job continues without it; set --compilation_cache to use another folder", error
        )

    def _file(self, key: str) -> str:
        return join(self.path, f"{key}{_SUFFIX}")


@contextmanager
def opened_cache(path: str | None) -> Generator[CompilationCache | None]:
    """Connect jax to the cache at `path` inside the `with` block; None disables caching.

    Programs are stored regardless of their compile time unless `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` is set.
    """
    cache = None if path is None else CompilationCache(path)
    settings = {"jax_enable_compilation_cache": cache is not None and jax.config.values["jax_enable_compilation_cache"]}
    if cache is not None and _MIN_COMPILE_SECONDS.upper() not in os.environ:
        settings[_MIN_COMPILE_SECONDS] = 0
    if path is not None and is_local(path):
        # XLA stores the results of GPU autotuning in a local folder below this one.
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
    """Make jax use `cache`. With None, jax opens its own cache at the next compilation if caching is enabled."""
    jax_cache.reset_cache()
    jax_cache._cache = cache
    jax_cache._cache_initialized = cache is not None


def _make_private(folder: str) -> None:
    """Create a folder that no other user can write to. A failure recurs at the first write, which logs a warning."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        logger.debug("cannot create %s: %s", folder, error)
