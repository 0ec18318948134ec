"""Weights that hold NaN or infinities stop generation with the name of the request, and rows never hold them."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny_model import TINY

from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import ModelError
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine, _fetch_drawn
from simpo_pipeline.inference.forward import SampledTokens
from simpo_pipeline.inference.sampling import are_finite
from simpo_pipeline.inference.scheduler import Round
from simpo_pipeline.inference.sequence import Completion, Request, SequenceState
from simpo_pipeline.model.transformer import Llama

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
DRAWING = SamplingParams(max_tokens=6, temperature=0.7, top_k=5, seed=3)


def requests_of(*prompts: tuple[int, ...], sampling: SamplingParams = GREEDY) -> list[Request]:
    return [Request(prompt, 100 + index, 7, sampling) for index, prompt in enumerate(prompts)]


def with_embedding(weights: Llama, row: int, value: float) -> Llama:
    """Return the weights with one number of the embedding, which is also the head, replaced."""
    changed = np.array(weights.embedding.array)
    changed[row, 5] = value
    placed = jax.device_put(changed, weights.embedding.array.sharding)
    return dataclasses.replace(weights, embedding=dataclasses.replace(weights.embedding, array=placed))


@pytest.mark.parametrize("sampling", [GREEDY, DRAWING], ids=["greedy", "drawn"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_stop_generation_with_the_name_of_the_request(
    weights: Llama, engine_of: Callable[..., Engine], sampling: SamplingParams, value: float
) -> None:
    # No prompt has token 299, and its logit is never the largest: only a check of every logit finds it.
    broken, requests = with_embedding(weights, 299, value), requests_of((1, 2, 3), (4,), sampling=sampling)
    with pytest.raises(
        ModelError, match=r"prompt 10[01], sample 7 are not finite after \d prompt tokens and 0 generated tokens"
    ):
        engine_of().generate(broken, requests, step=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_values_that_the_cache_cannot_hold_stop_generation_too(
    weights: Llama, engine_of: Callable[..., Engine], value: float
) -> None:
    changed = np.array(weights.layers.wv.array)
    changed.flat[changed.size // 2] = value
    wv = dataclasses.replace(weights.layers.wv, array=jax.device_put(changed, weights.layers.wv.array.sharding))
    broken = dataclasses.replace(weights, layers=dataclasses.replace(weights.layers, wv=wv))
    with pytest.raises(ModelError, match=r"sample 7 are not finite after \d prompt tokens and 0 generated tokens"):
        engine_of().generate(broken, requests_of((1, 2, 3), (4,)), step=0)


@pytest.mark.slow
def test_the_request_whose_cache_holds_nan_is_named_and_finished_ones_are_kept(
    weights: Llama, engine_of: Callable[..., Engine], mesh: Mesh
) -> None:
    # The head is untied, so that only sequences that contain token 299 meet the NaN.
    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    untied = dataclasses.replace(with_embedding(weights, 299, math.nan), head=weights.embedding, config=config)
    sizes = EngineSizes(max_seqs=6, max_seq_len=64, page_size=8, num_pages=48, prefill_chunk_tokens=64)
    engine = Engine(config, sizes, mesh, Programs())
    finished: list[Completion] = []
    requests = requests_of(*[(token, 5) for token in range(8)], (8, 299, 5, 6))
    with pytest.raises(ModelError, match=r"prompt 108, sample 7 are not finite after 4 prompt tokens and 0 generated"):
        engine.generate(untied, requests, step=0, on_finished=finished.extend)
    assert finished, "the first requests finish before the last one starts"
    expected, _ = engine_of().generate(weights, requests[:8], step=0)
    tokens_of = {completion.request: completion.tokens for completion in expected}
    assert all(completion.tokens == tokens_of[completion.request] for completion in finished)


def test_a_row_is_finite_only_if_every_logit_is() -> None:
    largest = np.finfo(np.float32).max
    rows = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    special = [math.nan, -math.nan, math.inf, -math.inf, largest, -largest, 1e-45, -0.0]
    for row, value in enumerate(special):
        rows[row, 37 * row] = value
    rows[20, 299], rows[21, 0], rows[22] = math.nan, -math.inf, math.nan
    rows[23], rows[24], rows[25, :2] = largest, -largest, (math.inf, -math.inf)
    got = jax.jit(are_finite)(jnp.asarray(rows), jnp.ones(64, bool))
    np.testing.assert_array_equal(got, np.isfinite(rows).all(axis=1))
    assert not np.asarray(got)[:4].any() and np.asarray(got)[4:8].all()


def test_more_likely_tokens_than_the_vocabulary_has_are_not_reported_as_minus_infinity() -> None:
    (request,) = requests_of((1, 2), sampling=SamplingParams(max_tokens=2, logprobs=20))
    # As a program returns them for a vocabulary of 9.
    top_ids, top_logprobs = np.full((1, 1, 20), -1, np.int32), np.full((1, 1, 20), -np.inf, np.float32)
    top_ids[..., :9], top_logprobs[..., :9] = np.arange(9), np.log(1 / 9)
    drawn = SampledTokens(np.zeros((1, 1), np.int32), top_logprobs[..., 0], top_ids, top_logprobs)  # pyright: ignore[reportArgumentType]
    ((tokens, (found,)),) = _fetch_drawn(Round((), (SequenceState(request, 0),), 1, 1, ()), drawn)
    assert tokens == [0] and [token for token, _ in found.top] == list(range(9))
    np.testing.assert_allclose(sum(math.exp(logprob) for _, logprob in found.top), 1, rtol=1e-5)
