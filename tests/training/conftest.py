"""The toy model of the training tests."""

import pytest

from simpo_pipeline.model.config import LlamaConfig


@pytest.fixture
def tiny_model() -> LlamaConfig:
    """Grouped heads, tied embeddings, two layers: every kind of leaf, a few thousand parameters."""
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=40,
        max_seq_len=64,
        tie_word_embeddings=True,
    )
