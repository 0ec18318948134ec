"""Checkpoints of a run's state, written in the background of training and read by a job that resumes.

    <folder>/00000004-1f2e3d4c/        written by orbax: every process writes its own shards
    <folder>/00000004-1f2e3d4c.json    written last: a checkpoint is finished only when it has this record

`begin` copies the state to the host and returns; files are written while the next updates run. A record contains the
digest of the state, which is computed again when the state is read. Invariant: a restored state has the digest of the
state that was written, or `restore` raises. Every process calls `begin`, `settle` and `restore`; only the leader reads
and writes records. No device program is launched: processes synchronize through the coordination service.
"""

import dataclasses
import hashlib
import logging
import threading
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from simpo_pipeline.errors import ConfigError, SimpoPipelineError, StorageError, TrainingError, first_line
from simpo_pipeline.processes import Processes, joint_digest
from simpo_pipeline.storage.files import list_names, read_json
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import absolute, join
from simpo_pipeline.training.config import CheckpointConfig
from simpo_pipeline.training.state import TrainState, state_digest

logger = logging.getLogger(__name__)

_RECORD_SUFFIX = ".json"
# Time that the slowest process may take to write its shards before the others give up the checkpoint.
_WRITE_TIMEOUT_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """Metadata of a finished checkpoint.

    Attributes:
        name: Name of its folder within the folder of all checkpoints.
        step: Number of finished updates of the state.
        data_position: `Trainer.data_position` by then.
        digest: The joint digest of the processes' states.
        version: Identity of the step that wrote it.
        layout: Number of processes and mesh of the state; a digest is valid for this layout only.
        progress: Data that the writer gets back when it resumes, made of JSON values.
    """

    name: str
    step: int
    data_position: int
    digest: str
    version: str
    layout: str
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one step, in one folder."""

    def __init__(
        self, output: OutputFolder, config: CheckpointConfig, processes: Processes, mesh: Mesh, *, version: str
    ):
        """Create the checkpointer; `output` is local or on `gs://`, `version` is the identity of the step."""
        self._output = output
        self._folder = absolute(output.path)
        self._keep = config.keep
        self._processes = processes
        self._version = version
        self._layout = f"{processes.process_count} processes, {dict(mesh.shape)}"
        self._pending: CheckpointRecord | None = None
        self._all_written = threading.Event()
        count = processes.process_count
        # With active_processes set, orbax uses the coordination service; otherwise it would launch a device program.
        options = ocp.options.MultiprocessingOptions(
            primary_host=0,
            active_processes=set(range(count)) if count > 1 else None,
            barrier_sync_key_prefix=_key_of(self._folder) if count > 1 else None,
        )
        self._orbax = ocp.AsyncCheckpointer(
            _handler(options),
            multiprocessing_options=options,
            timeout_secs=_WRITE_TIMEOUT_SECONDS,
            # Called on the leader when every process has written its shards, right before orbax moves them into place.
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._all_written.set),
        )

    def newest(self, after: int, until: int) -> CheckpointRecord | None:
        """Return the finished checkpoint of this step with the most updates, more than `after` and at most `until`.

        Raises:
            ConfigError: it was written with another layout, for which the digest would differ.
            StorageError: a record cannot be read.
        """
        found: dict[str, Any] | None = self._processes.leader_decides(lambda: self._find_newest(after, until))
        record = CheckpointRecord(**found) if found is not None else None
        if record is not None and record.layout != self._layout:
            raise ConfigError(
                f"checkpoint {self._path_of(record)!r} was written by {record.layout}, but this job has "
                f"{self._layout}: another layout rounds differently. Start the job with the same layout, or delete "
                f"{self._folder!r} to recompute the state."
            )
        return record

    def restore(self, record: CheckpointRecord, abstract: TrainState) -> TrainState:
        """Return the state of a finished checkpoint, with the shapes, dtypes and shardings of `abstract`.

        Raises:
            StorageError: its files cannot be read.
            TrainingError: the state is not the one that was written.
        """
        path = self._path_of(record)
        wanted = _by_name(abstract)
        arguments = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        try:
            found = self._orbax.restore(path, args=arguments)
        except Exception as error:  # orbax and tensorstore raise their own types; all mean it cannot be read
            raise StorageError(
                f"checkpoint {path!r} cannot be read ({type(error).__name__}: {first_line(error)}); restart the job, "
                f"and if its files are lost, delete {path + _RECORD_SUFFIX!r} first."
            ) from error
        state = jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in wanted])
        own = state_digest(state, step=record.step, data_position=record.data_position)
        digest = joint_digest(self._processes.gather(own))
        if digest != record.digest:
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise TrainingError(
                f"checkpoint {path!r} contains a state with digest {digest}, but {record.digest} was written: its "
                f"files have changed. Delete {path + _RECORD_SUFFIX!r} and restart the job."
            )
        logger.info("resumed from checkpoint %s, after update %d", path, record.step)
        return state

    def begin(self, state: TrainState, *, step: int, data_position: int, progress: dict[str, Any]) -> None:
        """Copy the state to the host and start to write it; a checkpoint that is still being written is finished first.

        `progress` is written only at the end: the caller must not change it.

        Raises:
            StorageError: the previous checkpoint could not be written, or this one could not be started.
        """
        self.settle()
        self._output.check()
        own = state_digest(state, step=step, data_position=data_position)
        digest = joint_digest(self._processes.gather(own))
        self._all_written.clear()
        # Each checkpoint has a unique name: a job that lost its lease must not write where the next holder writes.
        name: str = self._processes.agree(f"{step:08d}-{uuid.uuid4().hex[:8]}")
        record = CheckpointRecord(name, step, data_position, digest, self._version, self._layout, progress)
        with _storage_errors("write", self._path_of(record)):
            self._orbax.save(self._path_of(record), args=ocp.args.PyTreeSave(_by_name(state)))
        self._pending = record

    def settle(self, *, wait: bool = True) -> None:
        """Record the checkpoint that is being written, once every process has written its shards.

        Without `wait`, it is recorded only if all shards are already written. Only the leader can detect this; other
        processes do nothing.

        Raises:
            StorageError: the checkpoint could not be written.
        """
        pending = self._pending
        if pending is None or (not wait and not self._all_written.is_set()):
            return
        with _storage_errors("write", self._path_of(pending)):
            self._orbax.wait_until_finished()
        self._pending = None
        if self._processes.is_leader:
            self._output.write_json(pending.name + _RECORD_SUFFIX, dataclasses.asdict(pending))
            logger.info("wrote checkpoint %s, after update %d", self._path_of(pending), pending.step)
            self._prune(pending)

    def close(self) -> None:
        """Wait for outstanding writes and close; a checkpoint without a record by then does not count."""
        self._orbax.close()

    def _path_of(self, record: CheckpointRecord) -> str:
        return join(self._folder, record.name)

    def _find_newest(self, after: int, until: int) -> dict[str, Any] | None:
        for name in reversed(self._recorded_names()):
            record = read_json(join(self._folder, name + _RECORD_SUFFIX))
            if record["version"] != self._version:
                logger.warning(
                    "ignoring checkpoint %s: it belongs to another version of this step", join(self._folder, name)
                )
            elif after < record["step"] <= until:
                return record
        return None

    def _is_own(self, name: str) -> bool:
        return read_json(join(self._folder, name + _RECORD_SUFFIX))["version"] == self._version

    def _recorded_names(self) -> list[str]:
        """Return the names of the finished checkpoints, sorted by number of updates."""
        names = [name for name in list_names(self._folder) if not name.startswith(".")]
        return sorted(name.removesuffix(_RECORD_SUFFIX) for name in names if name.endswith(_RECORD_SUFFIX))

    def _prune(self, newest: CheckpointRecord) -> None:
        """Remove checkpoints beyond the number to keep, those of other versions, and unfinished ones.

        No checkpoint is being written at this point.
        """
        others = [name for name in self._recorded_names() if name != newest.name and self._is_own(name)]
        kept = {newest.name, *others[max(0, len(others) - self._keep + 1) :]}
        for name in list_names(self._folder):
            if name.endswith(_RECORD_SUFFIX) and name.removesuffix(_RECORD_SUFFIX) not in kept:
                self._output.remove(name)
        # Records are removed first: a folder that is partly removed must not count as a checkpoint.
        for name in list_names(self._folder):
            if not name.endswith(_RECORD_SUFFIX) and name not in kept:
                self._output.remove(name)


def _handler(options: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Return a handler that writes arrays shard by shard; everything that would launch a program is turned off."""
    # Otherwise a program slices a replicated array, and each replica writes a part.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=options,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
        enable_pinned_host_transfer=False,
    )


def _by_name(state: TrainState) -> dict[str, Any]:
    """Return the leaves by path, so that orbax does not need to know our classes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="-"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _key_of(folder: str) -> str:
    """Return the prefix of the barrier keys of one step's checkpoints, the same in all processes."""
    return f"checkpoints-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"


@contextmanager
def _storage_errors(action: str, path: str) -> Generator[None]:
    """Convert exceptions of orbax and tensorstore, which raise their own types, to StorageError."""
    try:
        yield
    except SimpoPipelineError:
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {first_line(error)}"
        raise StorageError(
            f"cannot {action} checkpoint {path!r} ({detail}). Check the path and your permissions."
        ) from error
