import jax
import numpy as np
import pytest
import scipy.special

from simpo_pipeline.inference.config import MAX_LOGPROBS
from simpo_pipeline.inference.logprobs import token_logprobs
from simpo_pipeline.inference.sampling import SamplingRows

compute = jax.jit(token_logprobs)


def rows_requesting(logprobs: list[int]) -> SamplingRows:
    """Return rows with a low temperature, which must not affect log-probabilities."""
    num_rows = len(logprobs)
    ones, indices = np.ones(num_rows, np.float32), np.zeros(num_rows, np.uint32)
    integers = np.ones(num_rows, np.int32)
    return SamplingRows(
        temperature=ones / 4,
        top_p=ones / 2,
        top_k=integers,
        min_p=ones,
        repetition_penalty=ones * 2,
        seed=indices,
        prompt_index=indices,
        sample_index=indices,
        first_stop=integers * 100,
        stop_tokens=integers[:, None],
        logprobs=np.array(logprobs, np.int32),
    )


@pytest.mark.parametrize("vocab", [1, 5, 20, 333, 5000])
def test_log_probabilities_are_those_of_the_raw_logits(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=(64, vocab)) * 3).astype(np.float32)
    # Many are equal, and among those the lower id comes first; adding 0 turns -0 into 0.
    logits[:32] = np.round(logits[:32]) + 0
    tokens = rng.integers(0, vocab, 64, dtype=np.int32)
    chosen, ids, top = map(np.asarray, compute(logits, tokens, rows_requesting([-1] * 63 + [3])))
    exact = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(chosen, exact[np.arange(64), tokens], rtol=0, atol=1e-5)
    ranked = np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    num_top = ranked.shape[1]
    np.testing.assert_array_equal(ids[:, :num_top], ranked)
    np.testing.assert_allclose(top[:, :num_top], np.take_along_axis(exact, ranked, axis=-1), rtol=0, atol=1e-5)
    assert ids.shape == top.shape == (64, MAX_LOGPROBS)
    assert (ids[:, num_top:] == -1).all() and np.isneginf(top[:, num_top:]).all()
    assert (chosen.dtype, ids.dtype, top.dtype) == (np.float32, np.int32, np.float32)


def test_log_probabilities_that_no_row_requests_are_zero():
    logits = np.random.default_rng(0).normal(size=(2, 100)).astype(np.float32)
    tokens = np.array([3, 4], np.int32)
    nothing = compute(logits, tokens, rows_requesting([-1, -1]))
    assert not any(np.asarray(each).any() for each in nothing)
    chosen, ids, top = map(np.asarray, compute(logits, tokens, rows_requesting([-1, 0])))
    assert chosen.all() and not ids.any() and not top.any()
    np.testing.assert_array_equal(chosen, compute(logits, tokens, rows_requesting([5, 0]))[0])
