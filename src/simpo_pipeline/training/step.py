"""One update as one device program: forward, SimPO, backward, clip, AdamW.

    (state, batch) -> (state, metrics)        the state is donated; metrics are replicated fp32 scalars

Both responses of every pair go through the model together, in one forward pass over rows of tokens (`data.rows`). Rows
are sharded over the mesh axis "data"; each pair is on one device. The program is the same for one device and for many:
only the shardings of its arguments differ. With gradient accumulation, the parts (microbatches) of the batch go through
the model one after the other, and their losses and gradients add up to those of the whole batch.

Padding follows the tokens and attention is causal, so padding does not affect the tokens before it. The matmul with the
unembedding covers only positions where a token of an answer is predicted. This module does not know which update it
runs, where weights come from, or how batches are made.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from haliax import Axis, NamedArray
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from simpo_pipeline.data.rows import RowBatch, RowShape
from simpo_pipeline.distributed.mesh import DATA_AXIS, place
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import fsdp_placement
from simpo_pipeline.model.transformer import (
    ANYWHERE,
    Llama,
    Placement,
    transform,
    unembedding,
)
from simpo_pipeline.ops.attention import Segments
from simpo_pipeline.ops.logprobs import token_logprobs
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.optimizer import apply_gradient, build_optimizer
from simpo_pipeline.training.simpo import simpo_loss
from simpo_pipeline.training.state import TrainState, abstract_state

StepMetrics = dict[str, Float[Array, ""]]


class PartArrays(NamedTuple):
    """Rows that go through the model together; fields as in `RowBatch`."""

    tokens: Int32[Array, "*parts rows row_len"]
    positions: Int32[Array, "*parts rows row_len"]
    segments: Int32[Array, "*parts rows row_len"]
    branches: Int32[Array, "*parts rows row_len"]
    slots: Int32[Array, "*parts rows slots 2"]
    predict_at: Int32[Array, "*parts groups predictions"]
    targets: Int32[Array, "*parts groups predictions"]
    sequences: Int32[Array, "*parts groups predictions"]
    pair_weights: Float32[Array, "*parts pairs"]
    """Weight of each pair in the mean over the batch; 0 for pairs of other parts."""


class BatchArrays(NamedTuple):
    """A `RowBatch` on the devices, split into parts."""

    parts: PartArrays
    answer_lens: Float32[Array, "pairs 2"]


class LossSums(NamedTuple):
    """Values that are summed over the parts of a batch."""

    loss: Float[Array, ""]
    metrics: StepMetrics
    margins: Float[Array, " pairs"]
    """avg(chosen) - avg(rejected) of each pair, nats per token; 0 for pairs of other parts."""


def build_init_moments(programs: Programs, model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh) -> Program:
    """Compile `params -> (moments, moving average or None)`, the values at the start of a run."""
    key = ("init_moments", model_config, config, mesh)
    return programs.built_once(key, lambda: _compile_init_moments(programs, model_config, config, mesh))


def _compile_init_moments(programs: Programs, model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh) -> Program:
    abstract = abstract_state(model_config, config, mesh)
    optimizer = build_optimizer(config.optimizer, config.num_train_steps)

    def init_moments(params: Any) -> tuple[Any, Llama | None]:
        return optimizer.init(params), None if config.ema_decay is None else jax.tree.map(jnp.copy, params)

    wanted = jax.tree.map(lambda leaf: leaf.sharding, (abstract.opt_state, abstract.ema))
    return programs.compile("init_moments", init_moments, abstract.params, out_shardings=wanted)


def build_train_step(
    programs: Programs, model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh, shape: RowShape
) -> Program:
    """Compile `(TrainState, BatchArrays) -> (TrainState, metrics)`; the given state is donated.

    Metrics are those of `part_loss` and `grad_norm`, the global norm of the gradient before clipping.
    """
    key = ("train_step", model_config, config, mesh, shape)
    return programs.built_once(key, lambda: _compile_train_step(programs, model_config, config, mesh, shape))


def _compile_train_step(
    programs: Programs, model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh, shape: RowShape
) -> Program:
    optimizer = build_optimizer(config.optimizer, config.num_train_steps)
    placement = fsdp_placement(mesh, jnp.dtype(config.compute_dtype), shape.slot_lens)

    def train_step(state: TrainState, batch: BatchArrays) -> tuple[TrainState, StepMetrics]:
        metrics, grads = loss_and_gradient(state.params, batch, config, placement)
        params, opt_state = apply_gradient(optimizer, grads, state.opt_state, state.params)
        ema = _update_ema(state.ema, params, config.ema_decay)
        return TrainState(params, opt_state, state.rng, ema), metrics | {"grad_norm": optax.tree.norm(grads)}

    state = abstract_state(model_config, config, mesh)
    return programs.compile(
        "train_step",
        train_step,
        state,
        abstract_batch(config, mesh, shape),
        donate_argnums=(0,),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())),
    )


def build_eval_step(
    programs: Programs, model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh, shape: RowShape
) -> Program:
    """Compile `(params, BatchArrays) -> LossSums` of a batch; all outputs are replicated."""
    key = ("eval_step", model_config, config, mesh, shape)
    return programs.built_once(key, lambda: _compile_eval_step(programs, model_config, config, mesh, shape))


def _compile_eval_step(
    programs: Programs, model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh, shape: RowShape
) -> Program:
    placement = fsdp_placement(mesh, jnp.dtype(config.compute_dtype), shape.slot_lens)

    def eval_step(params: Llama, batch: BatchArrays) -> LossSums:
        return _sum_over_parts(lambda part: part_loss(params, part, batch.answer_lens, config, placement), batch)

    params = abstract_state(model_config, config, mesh).params
    return programs.compile(
        "eval_step",
        eval_step,
        params,
        abstract_batch(config, mesh, shape),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


def loss_and_gradient(
    params: Llama, batch: BatchArrays, config: TrainerConfig, placement: Placement = ANYWHERE
) -> tuple[StepMetrics, Llama]:
    """Return the metrics of a batch, including `loss`, and the gradient of the loss with respect to `params`."""

    def of_part(part: PartArrays) -> tuple[LossSums, Llama]:
        def loss(params: Llama) -> tuple[Float[Array, ""], LossSums]:
            sums = part_loss(params, part, batch.answer_lens, config, placement)
            return sums.loss, sums

        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return sums, gradient

    sums, gradient = _sum_over_parts(of_part, batch)
    return sums.metrics, gradient


def part_loss(
    params: Llama,
    part: PartArrays,
    answer_lens: Float32[Array, "pairs 2"],
    config: TrainerConfig,
    placement: Placement = ANYWHERE,
) -> LossSums:
    """Return the contribution of one part to the loss and metrics of the batch; differentiable in `params`.

    Metrics are those of `simpo_loss`, and `loss`. If a term over tokens has a weight other than 0, `sft_loss` or
    `z_loss` is added for it, without its weight, and so is `preference_loss`, the loss without these terms.
    """
    logps, log_sums = answer_logps(params, part, config, placement)
    is_answer = part.sequences >= 0
    pair_logps = _sum_by_sequence(jnp.where(is_answer, logps, 0), part.sequences, answer_lens.shape)
    averages = pair_logps / jnp.maximum(answer_lens, jnp.ones((), answer_lens.dtype))
    loss, metrics = simpo_loss(averages[:, 0], averages[:, 1], config.simpo, part.pair_weights)
    terms = {}
    if config.simpo.sft_weight:
        terms["sft_loss"] = -jnp.sum(pair_logps[:, 0]) / jnp.sum(answer_lens[:, 0]), config.simpo.sft_weight
    if config.simpo.z_loss_weight:
        squares = jnp.sum(jnp.where(is_answer, log_sums, 0) ** 2)
        terms["z_loss"] = squares / jnp.sum(answer_lens), config.simpo.z_loss_weight
    if terms:
        metrics["preference_loss"] = loss
    for name, (term, weight) in terms.items():
        metrics[name] = term
        loss = loss + weight * term
    margins = jnp.where(part.pair_weights > 0, averages[:, 0] - averages[:, 1], 0)
    return LossSums(loss, metrics | {"loss": loss}, margins)


def answer_logps(
    params: Llama, part: PartArrays, config: TrainerConfig, placement: Placement = ANYWHERE
) -> tuple[Float[Array, "groups predictions"], Float[Array, "groups predictions"]]:
    """Return the log-prob (fp32) and the log-normalizer of each predicted token; values at padding are arbitrary."""
    axes = (Axis("row", part.tokens.shape[0]), Axis("position", part.tokens.shape[1]))
    hidden, _ = transform(
        params,
        NamedArray(part.tokens, axes),
        NamedArray(part.positions, axes),
        attend=placement.attend,
        state=Segments(part.segments, part.branches, part.slots) if config.packing else None,
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        placement=placement,
    )
    num_groups = part.predict_at.shape[0]
    by_group = hidden.array.reshape(num_groups, -1, hidden.array.shape[2])
    predicting = jnp.take_along_axis(by_group, part.predict_at[:, :, None], axis=1)
    group_axes = (Axis("group", num_groups), Axis("prediction", predicting.shape[1]), hidden.axes[2])
    predicting = placement.hidden(NamedArray(predicting, group_axes))
    logps, log_sums = token_logprobs(
        placement.predicting(predicting.array.reshape(part.targets.size, -1)),
        placement.unembedding(unembedding(params)).array,
        part.targets.reshape(part.targets.size),
        config.logprob_chunk_size,
        placement.unembedding_gradient,
    )
    return logps.reshape(part.targets.shape), log_sums.reshape(part.targets.shape)


def abstract_batch(config: TrainerConfig, mesh: Mesh, shape: RowShape) -> BatchArrays:
    """Return the shapes and shardings of a batch; rows are sharded over the mesh axis "data"."""
    num_parts, num_pairs = config.grad_accumulation, config.train_batch_size

    def array(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    by_token = array((num_parts, shape.num_rows // num_parts, shape.row_len), jnp.int32, _BY_ROW)
    by_prediction = array((num_parts, shape.num_groups // num_parts, shape.num_predictions), jnp.int32, _BY_ROW)
    weights = array((num_parts, num_pairs), jnp.float32, PartitionSpec())
    return BatchArrays(
        PartArrays(
            tokens=by_token,
            positions=by_token,
            segments=by_token,
            branches=by_token,
            slots=array((num_parts, shape.num_rows // num_parts, len(shape.slot_lens), 2), jnp.int32, _BY_ROW),
            predict_at=by_prediction,
            targets=by_prediction,
            sequences=by_prediction,
            pair_weights=weights,
        ),
        array((num_pairs, 2), jnp.float32, PartitionSpec()),
    )


def place_batch(batch: RowBatch, config: TrainerConfig, mesh: Mesh) -> BatchArrays:
    """Put a batch on the devices.

    Every process passes the global batch and keeps its own rows; no program is launched. A batch with fewer pairs than
    the config specifies is filled up with pairs of weight 0.
    """
    num_parts, num_pairs = config.grad_accumulation, len(batch.pair_rows)
    rows_of_part = batch.tokens.shape[0] // num_parts
    weights = np.zeros((num_parts, config.train_batch_size), np.float32)
    weights[batch.pair_rows // rows_of_part, np.arange(num_pairs)] = 1 / num_pairs
    answer_lens = np.zeros((config.train_batch_size, 2), np.float32)
    answer_lens[:num_pairs] = batch.answer_lens

    def by_part(rows: np.ndarray) -> jax.Array:
        return place(rows.reshape(num_parts, len(rows) // num_parts, *rows.shape[1:]), NamedSharding(mesh, _BY_ROW))

    replicated = NamedSharding(mesh, PartitionSpec())
    return BatchArrays(
        PartArrays(
            tokens=by_part(batch.tokens),
            positions=by_part(batch.positions),
            segments=by_part(batch.segments),
            branches=by_part(batch.branches),
            slots=by_part(batch.slots),
            predict_at=by_part(batch.predict_at),
            targets=by_part(batch.targets),
            sequences=by_part(batch.sequences),
            pair_weights=place(weights, replicated),
        ),
        place(answer_lens, replicated),
    )


_BY_ROW = PartitionSpec(None, DATA_AXIS)


def _sum_over_parts(function: Callable[[PartArrays], Any], batch: BatchArrays) -> Any:
    """Return the sum of `function` over the parts of a batch, computed one after the other."""
    first = jax.tree.map(lambda array: array[0], batch.parts)
    if batch.parts.tokens.shape[0] == 1:
        return function(first)

    def add(sums: Any, part: PartArrays) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, function(part)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(add, zeros, batch.parts)[0]


def _sum_by_sequence(
    values: Float[Array, "groups predictions"], sequences: Int32[Array, "groups predictions"], shape: tuple[int, ...]
) -> Float[Array, "pairs 2"]:
    # An index past the last sequence is dropped.
    at = jnp.where(sequences >= 0, sequences, math.prod(shape))
    return jnp.zeros(math.prod(shape), values.dtype).at[at].add(values, mode="drop").reshape(shape)


def _update_ema(ema: Llama | None, params: Llama, decay: float | None) -> Llama | None:
    if ema is None or decay is None:
        return None
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)
