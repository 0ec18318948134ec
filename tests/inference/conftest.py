"""Tiny random models, and the engine's oracle: a plain loop over whole sequences."""

from collections.abc import Callable, Sequence

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis, NamedArray
from jax.sharding import Mesh
from tiny_model import TINY

from simpo_pipeline.distributed.mesh import local_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.inference.config import EngineSizes
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import (
    Llama,
    abstract_llama,
    attend_whole_sequences,
    logits,
    transform,
)


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return local_mesh()


@pytest.fixture(scope="session")
def weights_of(mesh: Mesh, random_llama: Callable) -> Callable[[LlamaConfig], Llama]:
    """Return a function that makes random weights, placed as engines require."""

    def make(config: LlamaConfig) -> Llama:
        shapes = with_shardings(abstract_llama(config, jnp.float32), mesh, TENSOR_PARALLEL_RULES)
        placement = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        return jax.device_put(random_llama(config), placement)

    return make


@pytest.fixture(scope="session")
def weights(weights_of: Callable[[LlamaConfig], Llama]) -> Llama:
    return weights_of(TINY)


@pytest.fixture(scope="session")
def programs() -> Programs:
    return Programs()


@pytest.fixture(scope="session")
def engine_of(mesh: Mesh, programs: Programs) -> Callable[..., Engine]:
    """Return a function that makes engines for TINY; programs of equal shapes are compiled once per session."""

    def make(**sizes: int) -> Engine:
        defaults = {"max_seqs": 6, "max_seq_len": 64, "page_size": 8, "num_pages": 48, "prefill_chunk_tokens": 64}
        return Engine(TINY, EngineSizes(**defaults | sizes), mesh, programs)

    return make


@pytest.fixture(scope="session")
def next_logits(weights: Llama) -> Callable[[Sequence[int]], np.ndarray]:
    """Return the oracle: the model on a whole sequence of at most 64 tokens, without cache or batch."""

    @jax.jit
    def after(weights: Llama, tokens: jax.Array, num_tokens: jax.Array) -> jax.Array:
        axes = (Axis("batch", 1), Axis("position", tokens.shape[0]))
        hidden, _ = transform(
            weights,
            NamedArray(tokens[None], axes),
            hax.arange(axes[1]).broadcast_axis(axes[0]).rearrange(axes),
            attend=attend_whole_sequences,
            state=None,
            dtype=jnp.float32,
        )
        return logits(weights, hidden).array[0, num_tokens - 1]

    def next_logits(tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros(64, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(after(weights, padded, np.int32(len(tokens))))

    return next_logits


@pytest.fixture(scope="session")
def greedy_tokens(next_logits: Callable[[Sequence[int]], np.ndarray]) -> Callable[[Sequence[int], int], list[int]]:
    """Return a function that gives the likeliest tokens after a prompt, according to the oracle."""

    def generate(prompt: Sequence[int], num_new: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_new):
            tokens.append(int(np.argmax(next_logits(tokens))))
        return tokens[len(prompt) :]

    return generate
