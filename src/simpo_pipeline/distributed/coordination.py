"""The coordination service of a job: a key-value store and barriers that all its processes share.

Nothing here launches a device program. jax keeps the client of this service private; this file alone imports it, and
`tests/distributed/test_coordination.py` notices when it moves.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from jax._src import distributed as jax_distributed

from simpo_pipeline.distributed.config import Membership
from simpo_pipeline.errors import ConfigError, CoordinationError

# jax's own detection of dead processes, behind ours (`WatchConfig.silence_seconds`): it ends a process from a thread
# in C++, without a word from Python.
HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 20
# A slice's hosts start minutes apart.
_GATHERING_SECONDS = 600


@runtime_checkable
class Coordination(Protocol):
    """A key-value store that all processes of a job share, and its barriers."""

    def put(self, key: str, value: bytes) -> None:
        """Stores a value, in place of an earlier one."""
        ...

    def get(self, key: str, timeout_seconds: float) -> bytes | None:
        """The value, as soon as it is there; None when it does not come in time."""
        ...

    def get_now(self, key: str) -> bytes | None:
        """The value if it is there."""
        ...

    def list(self, prefix: str) -> dict[str, bytes]:
        """Every key below `prefix`, which ends with a slash, and its value."""
        ...

    def delete(self, key: str) -> None:
        """Removes a key, and all below it."""
        ...

    def barrier(self, name: str, timeout_seconds: float) -> bool:
        """Waits until every process has come to the barrier of that name; False when they do not in time."""
        ...


class JaxCoordination:
    """The service that `jax.distributed` runs in process 0. Every call raises CoordinationError when it is lost."""

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
        """The call's result; None for a key that is not there, or not in time."""
        try:
            return getattr(self._client, method)(*args, **options)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("NOT_FOUND", "DEADLINE_EXCEEDED: GetKeyValue() timed out")):
                return None
            raise _lost(error) from error


def join(membership: Membership) -> tuple[int, int]:
    """Joins the job; returns this process's index and how many there are. No device is touched.

    Raises:
        ConfigError: the cluster does not say who belongs to the job.
        CoordinationError: the other processes did not come.
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
            f"this machine looks like one of a cluster, but jax cannot tell who belongs to the job: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in every process."
        ) from error
    except RuntimeError as error:
        raise CoordinationError(f"the processes of the job did not find each other: {error}") from error
    state = jax_distributed.global_state
    return state.process_id, state.num_processes or 1


def leave() -> None:
    """Ends the membership, when all processes do so."""
    jax.distributed.shutdown()


def _lost(error: Exception) -> CoordinationError:
    first_line = str(error).split("\n", 1)[0]
    return CoordinationError(f"the coordination service in process 0 does not answer: {first_line}")
