"""The state that an update reads and writes on the devices, and its digest.

The state has no step counter besides optax's own update count: the number of the next update is a Python int of the
trainer. Invariant: two states with equal digests continue identically, bit for bit, whatever happened between their
updates.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TRAINING_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.optimizer import build_optimizer


class TrainState(eqx.Module):
    """Master weights in float32, optimizer state, the run's key, and the moving average of the weights, if enabled.

    SimPO draws no random numbers, so `rng` (raw threefry key data) is carried unchanged from the start of the run.
    """

    params: Llama
    opt_state: optax.OptState
    rng: UInt32[Array, "2"]
    ema: Llama | None = None


def abstract_state(model_config: LlamaConfig, config: TrainerConfig, mesh: Mesh) -> TrainState:
    """Return the state with a `jax.ShapeDtypeStruct` for each array, sharded over `mesh` by the training rules.

    Moments are sharded like their parameters; counts and the key are replicated.
    """
    optimizer = build_optimizer(config.optimizer, config.num_train_steps)

    def fresh(params: Any, rng: UInt32[Array, "2"]) -> TrainState:
        return TrainState(params, optimizer.init(params), rng, None if config.ema_decay is None else params)

    state = jax.eval_shape(fresh, abstract_llama(model_config, jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32))
    return with_shardings(state, mesh, TRAINING_RULES)


def state_digest(state: TrainState, *, step: int, data_position: int) -> str:
    """Return the SHA-256 (hex) of the state's bytes, the number of finished updates and the position in the pairs.

    The digest covers the path, dtype, shape and bytes of each leaf, in tree order. Each process hashes its own shards,
    each one once even if it is replicated, ordered by position in the array. Hosts therefore have different digests,
    and so do states that are sharded over different meshes. Host memory: a few leaves at a time.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    # hashlib releases the GIL, so leaves are hashed in parallel; map returns them in order.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        leaf_digests = list(pool.map(_leaf_digest, leaves))
    whole = hashlib.sha256(f"step {step}\ndata_position {data_position}\n".encode())
    for path, leaf, leaf_digest in zip(paths, leaves, leaf_digests, strict=True):
        whole.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {leaf_digest}\n".encode())
    return whole.hexdigest()


def _leaf_digest(leaf: jax.Array) -> str:
    shards = {_start(shard.index): shard.data for shard in leaf.addressable_shards}
    digest = hashlib.sha256()
    for start in sorted(shards):
        shard = np.ascontiguousarray(np.asarray(shards[start]))
        digest.update(f"{start} {shard.shape}\n".encode())
        digest.update(shard.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _start(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(part.start or 0 for part in index)
