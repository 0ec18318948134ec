"""Chunked log-probabilities against the direct ones: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.ops.logprobs import token_logprobs, token_logprobs_reference

TOKENS, EMBED, VOCAB = 12, 8, 50


def _inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((TOKENS, EMBED)) * 3, dtype)
    unembedding = jnp.asarray(rng.standard_normal((VOCAB, EMBED)), jnp.float32)
    # The first and the last token of the vocabulary, and both sides of chunk boundaries.
    targets = jnp.asarray([0, VOCAB - 1, 15, 16, 31, 32, 47, 48, *rng.integers(0, VOCAB, TOKENS - 8)], jnp.int32)
    return hidden, unembedding, targets


def test_the_reference_equals_the_formula_in_float64():
    hidden, unembedding, targets = _inputs()
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    expected = logits[np.arange(TOKENS), targets] - np.log(np.exp(logits).sum(-1))
    logps, log_sums = token_logprobs_reference(hidden, unembedding, targets)
    np.testing.assert_allclose(logps, expected, atol=1e-5)
    np.testing.assert_allclose(log_sums, np.log(np.exp(logits).sum(-1)), rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 16, 25, 49, 50, 1000])
def test_any_chunk_size_gives_the_direct_values_and_gradients(chunk_size):
    hidden, unembedding, targets = _inputs()
    cotangents = jnp.linspace(-1.0, 2.0, TOKENS, dtype=jnp.float32), jnp.linspace(3.0, -1.0, TOKENS, dtype=jnp.float32)

    def with_gradients(logprobs):
        return jax.jit(lambda h, u: (lambda out, pull: (*out, *pull(cotangents)))(*jax.vjp(logprobs, h, u)))

    expected = with_gradients(lambda h, u: token_logprobs_reference(h, u, targets))(hidden, unembedding)
    got = with_gradients(lambda h, u: token_logprobs(h, u, targets, chunk_size))(hidden, unembedding)
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(one, other, rtol=5e-6, atol=1e-5)


def test_logits_too_large_for_exp_stay_finite():
    hidden, unembedding, targets = _inputs()
    got, gradient = jax.value_and_grad(lambda h: token_logprobs(h, unembedding, targets, 16)[0].sum())(hidden * 100)
    assert np.isfinite(got)
    assert np.isfinite(gradient).all()


def test_gradients_have_the_dtypes_of_their_arguments():
    hidden, unembedding, targets = _inputs(jnp.bfloat16)
    out, pull = jax.vjp(lambda h, u: token_logprobs(h, u, targets, 16), hidden, unembedding)
    d_hidden, d_unembedding = pull(jax.tree.map(jnp.ones_like, out))
    assert [part.dtype for part in out] == [jnp.float32, jnp.float32]
    assert (d_hidden.dtype, d_unembedding.dtype) == (jnp.bfloat16, jnp.float32)
    exact = token_logprobs_reference(hidden.astype(jnp.float32), unembedding, targets)
    for got, expected in zip(out, exact, strict=True):
        np.testing.assert_allclose(got, expected, atol=0.2)


def test_the_full_logits_never_exist_forward_or_backward():
    tokens, embed, vocab, chunk_size = 64, 16, 4096, 256
    shapes = (
        jax.ShapeDtypeStruct((tokens, embed), jnp.float32),
        jax.ShapeDtypeStruct((vocab, embed), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    loss = jax.grad(lambda h, u, t: sum(part.sum() for part in token_logprobs(h, u, t, chunk_size)), argnums=(0, 1))
    memory = jax.jit(loss).lower(*shapes).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < tokens * vocab * 4


def test_an_empty_chunk_is_refused():
    with pytest.raises(ValueError, match="at least 1 vocabulary entry, got 0"):
        token_logprobs(*_inputs(), chunk_size=0)
