"""The trainer: the live value that training steps pass on to each other.

A `Trainer` owns the device buffers of one run's state. Every holder may read `params` between updates; only the holder
that took the trainer may call `train_until` or `free`. Each update donates the state it reads, so arrays borrowed from
`params` before an update are deleted after it.

    invariant: train_until(2), anything that only reads, train_until(7)  ==  train_until(7), bit for bit

because an update depends only on the state, the update's number and the loader's batch of that number. The trainer
remembers which pairs it reads and after which update it began: with a loader of other pairs, it reads these from their
beginning. It also remembers the shape of its batches, so that other pairs that fit it compile no new program.
A failed update leaves no state rather than a partial one: from then on the trainer raises.

This module does not know what happens between updates, or where metrics go.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import check_vocabulary
from simpo_pipeline.data.rows import RowShape
from simpo_pipeline.data.sweep import PairSweep
from simpo_pipeline.distributed.mesh import DATA_AXIS, place
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.errors import ConfigError, TrainingError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.transformer import Llama, init_llama
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.evaluation import BatchMetrics, Evaluation, join_metrics
from simpo_pipeline.training.optimizer import learning_rate_at
from simpo_pipeline.training.state import TrainState, abstract_state, state_digest
from simpo_pipeline.training.step import (
    BatchArrays,
    LossSums,
    build_eval_step,
    build_init_moments,
    build_train_step,
    place_batch,
)

# Called after each update with the number of finished updates and the update's metrics.
OnStep = Callable[[int, dict[str, float]], None]
# Returns the state for an abstract state.
LoadState = Callable[[TrainState], TrainState]


class Trainer:
    """A SimPO run in progress: `step` of `config.num_train_steps` updates are finished."""

    def __init__(
        self,
        config: TrainerConfig,
        model_config: LlamaConfig,
        params: Llama | None,
        *,
        programs: Programs,
        mesh: Mesh,
    ):
        """Start a run at update 0 from fp32 `params`, sharded like `abstract_params`; the trainer takes ownership.

        Without `params`, the trainer has no state until `restore` loads one. The update is compiled when the loader's
        shape is known. Prefer `start`, `start_random` or `resume`.
        """
        self.config = config
        self.model_config = model_config
        self.mesh = mesh
        self.step = 0
        self._programs = programs
        self._state: TrainState | None = None
        self._why_no_state = "none was loaded yet"
        self._train_shape: RowShape | None = None
        self._eval_shape: RowShape | None = None
        self._data: str | None = None
        self._data_begins_after = 0
        abstract = _abstract(config, model_config, mesh)
        if params is None:
            return
        program = build_init_moments(programs, model_config, config, mesh)
        moments, ema = program(params)
        rng = place(_key_data(config.seed), abstract.rng.sharding)
        self._state = TrainState(params, moments, rng, ema)

    @classmethod
    def start(cls, config: TrainerConfig, model_path: str, *, programs: Programs, mesh: Mesh) -> "Trainer":
        """Start a run from the weights of a Hugging Face folder (local or any fsspec path).

        Raises:
            ConfigError: the run does not fit the model or the mesh.
        """
        model_config = load_config(model_path)
        abstract = _abstract(config, model_config, mesh)
        params = load_weights(model_path, abstract.params)
        return cls(config, model_config, params, programs=programs, mesh=mesh)

    @classmethod
    def start_random(
        cls, config: TrainerConfig, model_config: LlamaConfig, *, programs: Programs, mesh: Mesh
    ) -> "Trainer":
        """Start a run from random weights, which depend only on `config.seed`.

        Raises:
            ConfigError: the run does not fit the model or the mesh.
        """
        abstract = _abstract(config, model_config, mesh)

        def init_params(key_data: jax.Array) -> Llama:
            return init_llama(model_config, jax.random.wrap_key_data(key_data, impl="threefry2x32"))

        program = programs.compile("init_params", init_params, abstract.rng, out_shardings=_shardings(abstract.params))
        params = program(place(_key_data(config.seed), abstract.rng.sharding))
        return cls(config, model_config, params, programs=programs, mesh=mesh)

    @classmethod
    def resume(
        cls,
        config: TrainerConfig,
        model_path: str,
        step: int,
        load: LoadState,
        *,
        data_position: int,
        programs: Programs,
        mesh: Mesh,
    ) -> "Trainer":
        """Return a run after `step` updates, with the state from `load` (see `restore`).

        Only the config is read from the folder.

        Raises:
            ConfigError: the run does not fit the model or the mesh.
        """
        trainer = cls(config, load_config(model_path), None, programs=programs, mesh=mesh)
        trainer.restore(step, load, data_position=data_position)
        return trainer

    def restore(self, step: int, load: LoadState, *, data_position: int) -> None:
        """Replace the state with that of the same run after `step` updates.

        Args:
            step: Number of finished updates of the state that `load` returns.
            load: Returns the state for an abstract state, with its shapes, dtypes and shardings. The old state is freed
                before the call, so the devices never hold two states.
            data_position: The position at which the next loader is read on, as `data_position` gave it for that state.
        """
        if self._state is not None:
            self._lose_state(f"it was being replaced with the state after update {step}")
        self._state = load(_abstract(self.config, self.model_config, self.mesh))
        self.step = step
        self._data, self._data_begins_after = None, step - data_position // self.config.train_batch_size

    @property
    def has_state(self) -> bool:
        """Whether the trainer has a complete state: no update failed, and it was not freed."""
        return self._state is not None

    @property
    def state(self) -> TrainState:
        """The state after `step` updates, borrowed: the next update donates it.

        Raises:
            TrainingError: an update failed, or the trainer was freed.
        """
        if self._state is None:
            raise TrainingError(f"this trainer has no state: {self._why_no_state}. Restart the run.")
        return self._state

    @property
    def params(self) -> Llama:
        """The fp32 master weights after `step` updates, borrowed like `state`."""
        return self.state.params

    @property
    def abstract_params(self) -> Llama:
        """Shapes, dtypes and shardings of `params`, for ahead-of-time compilation."""
        return _abstract(self.config, self.model_config, self.mesh).params

    @property
    def num_groups(self) -> int:
        """Number of row groups that a loader must make: one for each device and each part of a batch."""
        return self.config.grad_accumulation * self.mesh.shape[DATA_AXIS]

    @property
    def data_position(self) -> int:
        """Number of pairs read since the run began to read its current pairs: all updates, if it had no others."""
        return self._num_batches_read * self.config.train_batch_size

    @property
    def _num_batches_read(self) -> int:
        return self.step - self._data_begins_after

    def digest(self) -> str:
        """Return the digest of state, finished updates and data position; equal digests continue identically."""
        return state_digest(self.state, step=self.step, data_position=self.data_position)

    def train_until(self, stop: int, loader: PairLoader, on_step: OnStep) -> None:
        """Run the updates after `step`, up to and including update `stop` (counted from 1 over the whole run).

        Args:
            stop: Number of finished updates at the end; at least `step`, and at most `config.num_train_steps`.
            loader: The batches of the run; update n reads `loader.batch(n - 1)`. If earlier updates read a loader of
                other pairs, the first update from now on reads `loader.batch(0)`.
            on_step: Called after each update with `step` and the metrics of the update: those of `part_loss`,
                `grad_norm` (before clipping), `learning_rate`, `tokens` (without padding), `padding_share`,
                `tokens_per_second` and `step_seconds`.

        Raises:
            ConfigError: `stop` is below `step` or beyond the run, or the loader does not match the run.
            DataError: a pair contains a token outside the vocabulary of the model.
            TrainingError: the loss or gradient of an update is not finite; the state is lost.
        """
        if not self.step <= stop <= self.config.num_train_steps:
            raise ConfigError(
                f"train_until({stop}): {self.step} updates are finished and the run has "
                f"{self.config.num_train_steps}; give a number from {self.step} to {self.config.num_train_steps}."
            )
        self._check_loader(loader)
        if loader.num_updates != self.config.num_train_steps:
            raise ConfigError(
                f"the loader serves {loader.num_updates} updates, but the run has {self.config.num_train_steps} "
                "(num_train_steps). Build the loader from the config of the run."
            )
        if self._data not in (None, loader.data_digest):
            self._data_begins_after = self.step
        self._data = loader.data_digest
        if self._train_shape not in (None, loader.shape):
            loader = dataclasses.replace(loader, earlier_shape=self._train_shape)
        self._train_shape = loader.shape
        program = build_train_step(self._programs, self.model_config, self.config, self.mesh, loader.shape)
        while self.step < stop:
            metrics = self._update(loader, program)
            on_step(self.step, metrics)

    def in_run_shape(self, sweep: PairSweep) -> PairSweep:
        """Return the sweep in the shape of the run's earlier sweeps, if its pairs fit, and remember its shape.

        A phase calls it even if it resumes after its last evaluation, so that later phases evaluate in the same shape.

        Raises:
            ConfigError: the sweep does not match the run.
            DataError: a pair contains a token outside the vocabulary of the model.
        """
        self._check_loader(sweep)
        if self._eval_shape not in (None, sweep.shape):
            sweep = dataclasses.replace(sweep, earlier_shape=self._eval_shape)
        self._eval_shape = sweep.shape
        return sweep

    def evaluate(self, sweep: PairSweep) -> Evaluation:
        """Evaluate the current weights on the pairs of `sweep`, counting each pair once.

        Raises:
            ConfigError: the sweep does not match the run.
            DataError: a pair contains a token outside the vocabulary of the model.
        """
        sweep = self.in_run_shape(sweep)
        program = build_eval_step(self._programs, self.model_config, self.config, self.mesh, sweep.shape)
        batches: list[BatchMetrics] = []
        margins: list[float] = []
        for batch in sweep.batches():
            found: LossSums = jax.device_get(program(self.params, place_batch(batch, self.config, self.mesh)))
            metrics = {name: float(value) for name, value in found.metrics.items()}
            num_pairs, (chosen, rejected) = len(batch.answer_lens), batch.answer_lens.sum(axis=0).astype(int).tolist()
            batches.append(BatchMetrics(metrics, num_pairs, chosen, chosen + rejected))
            margins += found.margins[:num_pairs].tolist()
        return Evaluation(join_metrics(batches, self.config.simpo), tuple(margins))

    def free(self) -> None:
        """Delete the device buffers; from then on, the trainer raises. Freeing twice is allowed."""
        if self._state is not None:
            self._lose_state(f"it was freed after update {self.step}")

    def _update(self, loader: PairLoader, program: Program) -> dict[str, float]:
        start = time.perf_counter()
        batch = loader.batch(self._num_batches_read)
        metrics = self._advance(place_batch(batch, self.config, self.mesh), program)
        wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
        if wrong:
            self._lose_state(f"update {self.step + 1} was not finite")
            ids = [loader.pairs[index].prompt_id for index in loader.indices(self._num_batches_read)]
            raise TrainingError(
                f"update {self.step + 1} gave {wrong}, but training needs finite values; the run stops. "
                f"Check its pairs, {ids}, or lower optimizer.learning_rate ({self.config.optimizer.learning_rate})."
            )
        seconds = time.perf_counter() - start
        metrics["learning_rate"] = learning_rate_at(self.config.optimizer, self.config.num_train_steps, self.step)
        self.step += 1
        tokens = float(batch.num_tokens)
        speed = {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
        return metrics | {"tokens": tokens, "padding_share": batch.padding_share, **speed}

    def _advance(self, batch: BatchArrays, program: Program) -> dict[str, float]:
        """Replace the state with the next one; if the update fails in any way, the trainer has no state."""
        state, self._state = self.state, None
        self._why_no_state = f"update {self.step + 1} failed"
        state, metrics = program(state, batch)
        # Metrics are replicated, so every process sees the same values and makes the same decisions.
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._state = state
        return fetched

    def _lose_state(self, why: str) -> None:
        state, self._state, self._why_no_state = self._state, None, why
        jax.tree.map(lambda leaf: leaf.delete(), state)

    def _check_loader(self, loader: PairLoader | PairSweep) -> None:
        got = (loader.batch_size, loader.seq_len, loader.packing)
        wanted = (self.config.train_batch_size, self.config.train_seq_len, self.config.packing)
        if got != wanted:
            raise ConfigError(
                f"the loader serves batches of {got[0]} pairs of {got[1]} tokens with packing {got[2]}; this run has "
                f"{wanted[0]} pairs of {wanted[1]} with packing {wanted[2]} (train_batch_size, train_seq_len, "
                "packing). Build the loader from the config of the run."
            )
        if loader.num_groups != self.num_groups:
            raise ConfigError(
                f"the loader has {loader.num_groups} groups of rows, but the run has {self.config.grad_accumulation} "
                f"parts (grad_accumulation) on {self.mesh.shape[DATA_AXIS]} devices; set num_groups of the loader to "
                f"{self.num_groups}."
            )
        check_vocabulary(loader.pairs, loader.pad_id, self.model_config.vocab_size)


def _abstract(config: TrainerConfig, model_config: LlamaConfig, mesh: Mesh) -> TrainState:
    """Return the abstract state of a run.

    Raises:
        ConfigError: the run does not fit the model or the mesh.
    """
    if config.train_seq_len > model_config.max_seq_len:
        raise ConfigError(
            f"train_seq_len is {config.train_seq_len}, but the model's max_seq_len is {model_config.max_seq_len}; "
            "lower train_seq_len."
        )
    num_devices = mesh.shape[DATA_AXIS]
    if not config.packing and config.train_batch_size % (config.grad_accumulation * num_devices):
        raise ConfigError(
            f"train_batch_size is {config.train_batch_size} pairs, but the mesh has {num_devices} devices on its axis "
            f"{DATA_AXIS!r}, each with {config.grad_accumulation} parts (grad_accumulation); give a multiple of "
            f"{config.grad_accumulation * num_devices}, or set packing, which accepts any batch size."
        )
    return abstract_state(model_config, config, mesh)


def _shardings(abstract: object) -> object:
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _key_data(seed: int) -> np.ndarray:
    """Return the raw data of `jax.random.key(seed)` under threefry, without launching a program."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], dtype=np.uint32)
