"""Configuration of a job's processes: membership, watchdog timeouts and the compilation cache.

This module does not import jax, so that command-line flags can contain these classes.

A process learns about its job from its environment. Explicit settings (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`,
`JAX_PROCESS_ID`) take precedence. Without them, jax discovers the other processes on a TPU VM or in a TPU pod on GKE.
Otherwise the process is a job of its own.
"""

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable, Mapping

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.storage.paths import absolute, user_cache_folder

OFF = "off"
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Set by GKE in every container of a TPU slice.
_GKE_WORKERS = "TPU_WORKER_HOSTNAMES"
# Set when several slices form one job. Each slice may have a single host.
_MULTISLICE = "MEGASCALE_COORDINATOR_ADDRESS"
# Device files of the TPU driver on a TPU VM: v2 to v4, and v5 and later.
_TPU_DEVICES = ("dev/accel0", "dev/vfio/0")
# jax's own timeout for a dead process (`coordination.HEARTBEAT_SECONDS`), minus the time to record the reason.
_LONGEST_SILENCE_SECONDS = 18.0


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """Timeouts after which the processes of a job stop it, in seconds on each process's own clock.

    Attributes:
        silence_seconds: A process that has not been heard from for this long is considered killed or frozen.
        grace_seconds: Time that the other processes have to reach the end of the step by themselves after one fails.
        stall_seconds: Time that a step on devices may run without launching or compiling anything.
        file_stall_seconds: Time that planning, recording, or a step that only reads and writes files may take.
    """

    silence_seconds: float = 15.0
    grace_seconds: float = 3.0
    stall_seconds: float = 900.0
    file_stall_seconds: float = 14_400.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"watch.{field.name} must be a finite number of seconds above 0, got {value}")
        if self.silence_seconds > _LONGEST_SILENCE_SECONDS:
            raise ConfigError(
                f"watch.silence_seconds is {self.silence_seconds}; it must be at most {_LONGEST_SILENCE_SECONDS}, "
                "because otherwise jax ends the processes before the failure can be recorded"
            )


def compilation_cache_path(given: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the path where compiled programs are kept between jobs, or None if they are not kept.

    Args:
        given: A folder, a URL or `off`. None selects `JAX_COMPILATION_CACHE_DIR`, or this user's cache folder if that
            variable is not set.
        environment: The environment variables.

    Raises:
        ConfigError: `given` is empty, or a URL that lost a slash.
    """
    if given == OFF:
        return None
    if given is not None and not given.strip():
        raise ConfigError(f"--compilation_cache {given!r}: give a folder, gs://bucket/path, or {OFF}")
    return absolute(given or environment.get("JAX_COMPILATION_CACHE_DIR") or user_cache_folder("compiled"))


@dataclasses.dataclass(frozen=True)
class Membership:
    """The identity of a process within its job. Fields are None if jax detects them from the cluster."""

    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None


def _is_libtpu_installed() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def find_membership(
    environment: Mapping[str, str],
    root: pathlib.Path = pathlib.Path("/"),
    has_libtpu: Callable[[], bool] = _is_libtpu_installed,
) -> Membership | None:
    """Return the membership of this process in its job, or None if the process is a job of its own.

    Raises:
        ConfigError: the explicit settings are incomplete or malformed.
    """
    given = {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if given:
        return _explicit_membership(given)
    workers = [name for name in environment.get(_GKE_WORKERS, "").split(",") if name]
    # A device file alone is not enough: it may belong to any card that is passed through to a guest.
    has_tpu = any((root / device).exists() for device in _TPU_DEVICES) and has_libtpu()
    wants_tpu = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    is_pod = len(workers) > 1 or _MULTISLICE in environment
    return Membership() if wants_tpu and (is_pod or has_tpu) else None


def _explicit_membership(given: Mapping[str, str]) -> Membership:
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
        raise ConfigError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; set all three in every process of "
            "the job, or none of them for a job of one process"
        )
    address, count_text, index_text = (given[name] for name in _EXPLICIT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of the process with id 0")
    if not (count_text.isdecimal() and index_text.isdecimal() and int(index_text) < int(count_text)):
        raise ConfigError(
            f"JAX_NUM_PROCESSES is {count_text!r} and JAX_PROCESS_ID {index_text!r}; the id must be an integer "
            "from 0 to the number of processes minus 1"
        )
    return Membership(address, int(count_text), int(index_text))
