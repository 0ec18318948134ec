"""Our forward pass against Hugging Face transformers' on SmolLM2-135M-Instruct (see tests/golden/make_transformers.py).

All prompts run as one right-padded batch; transformers ran them one by one.
"""

from pathlib import Path

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.transformer import abstract_llama, attend_whole_sequences, logits, transform

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers_smollm2.npz"
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def sequences(golden):
    """Return (tokens [16, longest], each prompt followed by its generated tokens; length of each prompt)."""
    lengths = (golden["prompt_tokens"] >= 0).sum(axis=1)
    tokens = np.zeros((16, lengths.max() + 32), np.int32)
    for row, prompt, length, generated in zip(
        tokens, golden["prompt_tokens"], lengths, golden["generated_tokens"], strict=True
    ):
        row[:length], row[length : length + 32] = prompt[:length], generated
    return tokens, lengths


@pytest.fixture(scope="module")
def ours(smollm2_folder, golden, sequences):
    """Return logits at the golden vocabulary ids, log-sum-exp and best token of every position, and one whole row."""
    tokens, lengths = sequences
    config = load_config(str(smollm2_folder))
    model = load_weights(str(smollm2_folder), abstract_llama(config, jnp.float32))
    sequence, position = hax.Axis("sequence", tokens.shape[0]), hax.Axis("position", tokens.shape[1])

    @jax.jit
    def run(model, tokens, vocab_ids):
        hidden, _ = transform(
            model,
            hax.named(tokens, (sequence, position)),
            hax.arange(position).broadcast_axis(sequence),
            attend=attend_whole_sequences,
            state=None,
            dtype=jnp.float32,
        )
        every = logits(model, hidden).array
        return {
            "logits": every[..., vocab_ids],
            "logsumexp": jax.nn.logsumexp(every, axis=-1),
            "best": jnp.argmax(every, axis=-1),
            "last_row": every[0, lengths[0] - 1],
        }

    return {name: np.asarray(value) for name, value in run(model, tokens, golden["vocab_ids"]).items()}


@pytest.mark.parametrize("name", ["logits", "logsumexp"])
def test_logits_at_every_prompt_position_equal_transformers(ours, golden, sequences, name):
    _, lengths = sequences
    got = np.concatenate([row[:length] for row, length in zip(ours[name], lengths, strict=True)])
    np.testing.assert_allclose(got, golden[name], rtol=0, atol=TOLERANCE)


def test_a_whole_row_of_logits_equals_transformers(ours, golden):
    np.testing.assert_allclose(ours["last_row"], golden["last_row"], rtol=0, atol=TOLERANCE)


def test_the_best_token_at_every_generated_position_equals_transformers_greedy_choice(ours, golden, sequences):
    _, lengths = sequences
    got = [row[length - 1 : length + 31] for row, length in zip(ours["best"], lengths, strict=True)]
    np.testing.assert_array_equal(got, golden["generated_tokens"])
