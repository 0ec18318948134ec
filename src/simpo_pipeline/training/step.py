"""One update as one device program: forward, SimPO, backward, clip, AdamW.

    (state, batch) -> (state, metrics)        the state is donated; metrics are fp32 scalars, replicated

Both responses of every pair go through the model together, in one forward pass over [2 * pairs, seq] tokens. Pairs are
split over the mesh axis "data"; a pair's two responses stay on one device. The program is the same for one device and
for many: only the shardings of its arguments differ.

Padding stands after the response and attention is causal, so it changes nothing before it and needs no mask.
This module does not know which update it runs, where weights come from, or how batches are made.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from haliax import Axis, NamedArray
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from simpo_pipeline.data.loader import PairBatch
from simpo_pipeline.distributed.mesh import DATA_AXIS, place
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import FSDP_RULES, fsdp_placement
from simpo_pipeline.model.transformer import (
    ANYWHERE,
    Llama,
    Placement,
    attend_whole_sequences,
    transform,
    unembedding,
)
from simpo_pipeline.ops.logprobs import token_logprobs
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.optimizer import apply_gradient, build_optimizer
from simpo_pipeline.training.simpo import average_logps, simpo_loss
from simpo_pipeline.training.state import TrainState, abstract_state

Metrics = dict[str, Float[Array, ""]]


class PairArrays(NamedTuple):
    """A `PairBatch` on the devices: on the middle axis, 0 is the chosen response and 1 the rejected one."""

    tokens: Int32[Array, "pairs 2 seq"]
    loss_mask: Float32[Array, "pairs 2 seq"]


def build_train_step(
    programs: Programs, model_config: LlamaConfig, trainer_config: TrainerConfig, mesh: Mesh
) -> Program:
    """Compiles `(TrainState, PairArrays) -> (TrainState, metrics)`; the state given is consumed.

    Metrics are those of `simpo_loss`, and `grad_norm`, the global norm of the gradient before clipping.
    """
    optimizer = build_optimizer(trainer_config.optimizer, trainer_config.num_train_steps)
    placement = fsdp_placement(mesh, FSDP_RULES, jnp.dtype(trainer_config.compute_dtype))

    def train_step(state: TrainState, batch: PairArrays) -> tuple[TrainState, Metrics]:
        gradient = jax.value_and_grad(batch_loss, has_aux=True)
        (_, metrics), grads = gradient(state.params, batch, trainer_config, placement)
        params, opt_state = apply_gradient(optimizer, grads, state.opt_state, state.params)
        return TrainState(params, opt_state, state.rng), metrics | {"grad_norm": optax.tree.norm(grads)}

    state = abstract_state(model_config, optimizer, mesh)
    return programs.compile(
        "train_step",
        train_step,
        state,
        abstract_batch(trainer_config, mesh),
        donate_argnums=(0,),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(mesh, PartitionSpec())),
    )


def batch_loss(
    params: Llama, batch: PairArrays, config: TrainerConfig, placement: Placement = ANYWHERE
) -> tuple[Float[Array, ""], Metrics]:
    """The SimPO loss of a batch and its metrics; differentiable in `params`."""
    pairs, responses, seq = batch.tokens.shape
    tokens = batch.tokens.reshape(pairs * responses, seq)
    logps = next_token_logps(params, tokens, config, placement).reshape(pairs, responses, seq)
    averages = average_logps(logps, batch.loss_mask)
    return simpo_loss(averages[:, 0], averages[:, 1], config.simpo)


def next_token_logps(
    params: Llama, tokens: Int32[Array, "sequences seq"], config: TrainerConfig, placement: Placement = ANYWHERE
) -> Float[Array, "sequences seq"]:
    """Log-prob (fp32) at each position of the token after it; the last position's is of the row's first token."""
    axes = (Axis("sequence", tokens.shape[0]), Axis("position", tokens.shape[1]))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden, _ = transform(
        params,
        NamedArray(tokens, axes),
        NamedArray(positions, axes),
        attend=attend_whole_sequences,
        state=(),
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        placement=placement,
    )
    logps = token_logprobs(
        hidden.array.reshape(tokens.size, -1),
        placement.weight(unembedding(params)).array,
        jnp.roll(tokens, -1, axis=1).reshape(tokens.size),
        config.logprob_chunk_size,
    )
    return logps.reshape(tokens.shape)


def abstract_batch(config: TrainerConfig, mesh: Mesh) -> PairArrays:
    """The shapes and shardings of a batch: pairs over the mesh axis "data"."""
    shape = (config.train_batch_size, 2, config.train_seq_len)
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return PairArrays(
        tokens=jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),  # pyright: ignore[reportArgumentType]
        loss_mask=jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),  # pyright: ignore[reportArgumentType]
    )


def place_batch(batch: PairBatch, mesh: Mesh) -> PairArrays:
    """Puts a batch on the devices. Every process passes the whole batch and keeps its own rows; nothing is launched."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return PairArrays(
        tokens=place(np.stack([batch.chosen_tokens, batch.rejected_tokens], axis=1), sharding),
        loss_mask=place(np.stack([batch.chosen_loss_mask, batch.rejected_loss_mask], axis=1), sharding),
    )
