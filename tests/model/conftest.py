"""Small models of every kind."""

import jax
import pytest

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import init_llama


@pytest.fixture(scope="session")
def small_config() -> LlamaConfig:
    """Return a config with grouped heads, head_dim != hidden_size / num_heads, an untied head and large weights."""
    return LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=96,
        max_seq_len=64,
        initializer_range=0.25,
    )


@pytest.fixture(scope="session")
def random_model():
    """Return `init_llama`, compiled: op by op it takes seconds."""
    return jax.jit(init_llama, static_argnums=0)


@pytest.fixture(scope="session")
def small_model(small_config, random_llama):
    return random_llama(small_config)
