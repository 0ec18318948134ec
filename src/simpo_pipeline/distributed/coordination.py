"""The coordination service of a job: a key-value store and barriers that all its processes share.

Nothing here launches a device program. jax's client of this service is private. Only this file imports it, and
`tests/distributed/test_coordination.py` fails when the client moves.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jax._src import distributed as jax_distributed

from simpo_pipeline.distributed.config import Membership
from simpo_pipeline.errors import ConfigError, CoordinationError

# Timeout of jax's own detection of dead processes. It is longer than ours (`WatchConfig.silence_seconds`), because jax
# ends a process from a C++ thread, without any output from Python.
HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 20
# The hosts of a slice start minutes apart.
_GATHERING_SECONDS = 600


@runtime_checkable
class Coordination(Protocol):
    """A key-value store and barriers that all processes of a job share."""

    def put(self, key: str, value: bytes) -> None:
        """Store a value, replacing any earlier one."""
        ...

    def get(self, key: str, timeout_seconds: float) -> bytes | None:
        """Return the value as soon as it exists, or None if the timeout expires first."""
        ...

    def get_now(self, key: str) -> bytes | None:
        """Return the value if it exists, otherwise None."""
        ...

    def list(self, prefix: str) -> dict[str, bytes]:
        """Return every key below `prefix`, which must end with a slash, with its value."""
        ...

    def delete(self, key: str) -> None:
        """Remove a key and all keys below it."""
        ...

    def barrier(self, name: str, timeout_seconds: float) -> bool:
        """Wait until every process reaches the named barrier. Return False if the timeout expires first."""
        ...


class JaxCoordination:
    """The service that `jax.distributed` runs in process 0. Calls raise CoordinationError if the service is lost."""

    def __init__(self) -> None:
        client = jax_distributed.global_state.client
        if client is None:
            raise CoordinationError("this process has not joined a job; call join() first")
        self._client = client

    def put(self, key: str, value: bytes) -> None:
        """See Coordination.put."""
        self._call("key_value_set_bytes", key, value, allow_overwrite=True)

    def get(self, key: str, timeout_seconds: float) -> bytes | None:
        """See Coordination.get."""
        return self._call("blocking_key_value_get_bytes", key, int(timeout_seconds * 1000))

    def get_now(self, key: str) -> bytes | None:
        """See Coordination.get_now."""
        return self._call("key_value_try_get_bytes", key)

    def list(self, prefix: str) -> dict[str, bytes]:
        """See Coordination.list."""
        return dict(self._call("key_value_dir_get_bytes", prefix) or ())

    def delete(self, key: str) -> None:
        """See Coordination.delete."""
        self._call("key_value_delete", key)

    def barrier(self, name: str, timeout_seconds: float) -> bool:
        """See Coordination.barrier."""
        try:
            self._client.wait_at_barrier(name, int(timeout_seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return False
            raise _lost(error) from error
        return True

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        """Return the call's result, or None if the key does not exist or its timeout expired."""
        try:
            return getattr(self._client, method)(*args, **options)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("NOT_FOUND", "DEADLINE_EXCEEDED: GetKeyValue() timed out")):
                return None
            raise _lost(error) from error


def join(membership: Membership) -> tuple[int, int]:
    """Join the job. Return this process's index and the number of processes. No device is touched.

    Raises:
        ConfigError: jax cannot detect from the cluster which processes belong to the job.
        CoordinationError: the other processes did not join.
    """
    given: dict[str, Any] = {}
    if membership.coordinator_address is not None:
        given = {
            "coordinator_address": membership.coordinator_address,
            "num_processes": membership.process_count,
            "process_id": membership.process_index,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=_GATHERING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"this machine seems to be part of a cluster, but jax cannot detect the processes of the job: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in every process."
        ) from error
    except RuntimeError as error:
        raise CoordinationError(f"the processes of the job could not connect to each other: {error}") from error
    state = jax_distributed.global_state
    return state.process_id, state.num_processes or 1


def leave() -> None:
    """Leave the job, once all processes have called this function."""
    jax.distributed.shutdown()


def _lost(error: Exception) -> CoordinationError:
    first_line = str(error).split("\n", 1)[0]
    return CoordinationError(f"the coordination service in process 0 does not respond: {first_line}")
