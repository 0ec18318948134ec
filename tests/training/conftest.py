"""A toy run: a model of a few thousand parameters, a few pairs of different lengths, one device."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.distributed.mesh import DATA_AXIS, MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.training.config import OptimizerConfig, TrainerConfig


@pytest.fixture(scope="session")
def tiny_model() -> LlamaConfig:
    """Return a model with grouped heads, tied embeddings and two layers: every kind of leaf.

    The weights are large enough for answers to differ.
    """
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
        initializer_range=0.3,
    )


@pytest.fixture
def tiny_run() -> TrainerConfig:
    """Return a run of seven updates of two pairs, with the vocabulary of 40 processed in chunks of 16, 16 and 8."""
    return TrainerConfig(
        num_train_steps=7,
        train_batch_size=2,
        train_seq_len=16,
        logprob_chunk_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
    )


@pytest.fixture(scope="session")
def programs() -> Programs:
    """Return one instance for all tests, so that equal programs are compiled once."""
    return Programs()


@pytest.fixture
def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (DATA_AXIS, MODEL_AXIS))


@pytest.fixture
def five_pairs() -> list[TokenizedPair]:
    """Return pairs of random tokens below 40 in sequences of 5 to 15; the two answers of a pair share its prompt."""
    rng = np.random.default_rng(0)

    def make_pair(prompt_id: str) -> TokenizedPair:
        prompt = rng.integers(1, 40, size=rng.integers(2, 6), dtype=np.int32)
        chosen, rejected = (rng.integers(1, 40, size=rng.integers(3, 11), dtype=np.int32) for _ in range(2))
        return TokenizedPair(
            prompt_id=prompt_id,
            chosen_tokens=np.concatenate([prompt, chosen]),
            rejected_tokens=np.concatenate([prompt, rejected]),
            chosen_response_start=len(prompt),
            rejected_response_start=len(prompt),
        )

    return [make_pair(f"toy-{index}") for index in range(5)]


@pytest.fixture
def make_loader() -> Callable[..., PairLoader]:
    """Return a function that makes the loader for a config."""

    def make(pairs: list[TokenizedPair], config: TrainerConfig, pad_id: int = 0) -> PairLoader:
        return PairLoader(
            pairs=pairs,
            batch_size=config.train_batch_size,
            seq_len=config.train_seq_len,
            seed=config.seed,
            pad_id=pad_id,
            num_updates=config.num_train_steps,
            packing=config.packing,
            num_groups=config.grad_accumulation,
        )

    return make


@pytest.fixture
def loader(five_pairs: list[TokenizedPair], tiny_run: TrainerConfig, make_loader) -> PairLoader:
    return make_loader(five_pairs, tiny_run)
