"""Which processes make up the job, and when the job is given up. Imports no jax, so that flags can hold these.

A process learns of its job from its environment: explicit settings (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`,
`JAX_PROCESS_ID`), else a TPU VM or a TPU pod on GKE, where jax finds the others itself, else it is alone.
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
# Set where several slices make one job, which may have one host each.
_MULTISLICE = "MEGASCALE_COORDINATOR_ADDRESS"
# What the TPU driver of a TPU VM shows: v2 to v4, and v5 onwards.
_TPU_DEVICES = ("dev/accel0", "dev/vfio/0")
# What jax's own detection of a dead process waits for (`coordination.HEARTBEAT_SECONDS`), less the time to record why.
_LONGEST_SILENCE_SECONDS = 18.0


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """When the processes of a job give it up, in seconds by each process's own clock.

    Attributes:
        silence_seconds: A process that was not heard of for so long is taken to be killed or frozen.
        grace_seconds: How long the others have, when a process fails, to come to the end of the step by themselves.
        stall_seconds: A step on devices may go so long without launching or compiling anything.
        file_stall_seconds: A step that only reads and writes files, or planning and recording, may take so long.
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
                f"watch.silence_seconds is {self.silence_seconds}; at most {_LONGEST_SILENCE_SECONDS}, or jax ends the "
                "processes before anything can be recorded"
            )


def compilation_cache_path(given: str | None, environment: Mapping[str, str]) -> str | None:
    """Where compiled programs are kept between jobs; None where they are not.

    Args:
        given: A folder, a URL or `off`; None for `JAX_COMPILATION_CACHE_DIR`, or a folder of this user without it.
        environment: The environment variables.

    Raises:
        ConfigError: what is given is empty, or a URL that lost a slash.
    """
    if given == OFF:
        return None
    if given is not None and not given.strip():
        raise ConfigError(f"--compilation_cache {given!r}: give a folder, gs://bucket/path, or {OFF}")
    return absolute(given or environment.get("JAX_COMPILATION_CACHE_DIR") or user_cache_folder("compiled"))


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process's place in its job; None where jax finds it out from the cluster."""

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
    """The job that this process belongs to; None when it is a job of its own.

    Raises:
        ConfigError: the explicit settings are incomplete or no numbers.
    """
    given = {name: environment[name] for name in _EXPLICIT if environment.get(name)}
    if given:
        return _explicit_membership(given)
    workers = [name for name in environment.get(_GKE_WORKERS, "").split(",") if name]
    # Such a device alone may be any card that is passed through to a guest.
    has_tpu = any((root / device).exists() for device in _TPU_DEVICES) and has_libtpu()
    wants_tpu = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    is_pod = len(workers) > 1 or _MULTISLICE in environment
    return Membership() if wants_tpu and (is_pod or has_tpu) else None


def _explicit_membership(given: Mapping[str, str]) -> Membership:
    missing = [name for name in _EXPLICIT if name not in given]
    if missing:
        raise ConfigError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; set all three in every process of "
            "a job, or none for a job of one process"
        )
    address, count_text, index_text = (given[name] for name in _EXPLICIT)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of the process with id 0")
    if not (count_text.isdecimal() and index_text.isdecimal() and int(index_text) < int(count_text)):
        raise ConfigError(
            f"JAX_NUM_PROCESSES is {count_text!r} and JAX_PROCESS_ID {index_text!r}; the id must be a number from 0 "
            "to one less than the number of processes"
        )
    return Membership(address, int(count_text), int(index_text))
