import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from exact_sampling import exact_probabilities, require_draws_from

from simpo_pipeline.inference.config import MAX_STOP_TOKENS
from simpo_pipeline.inference.sampling import _BLOCK, SamplingRows, VocabSplit, _inverse_cdf, draw_tokens
from simpo_pipeline.inference.seen_tokens import seen_bits, seen_words
from simpo_pipeline.inference.token_filters import _TOP_TOKENS, kept_threshold

draw = jax.jit(draw_tokens)
keep = jax.jit(kept_threshold)
NEUTRAL = {
    "temperature": np.float32(1),
    "top_p": np.float32(1),
    "top_k": np.int32(0),
    "min_p": np.float32(0),
    "repetition_penalty": np.float32(1),
    "seed": np.uint32(0),
    "sample_index": np.uint32(0),
    "first_stop": np.int32(0),
    "logprobs": np.int32(-1),
}
NUM_DRAWS = 20_000
# Not a multiple of the bits per word of `seen`, nor of the width of the blocks that are searched.
VOCAB = 333
POSITION = 7


def rows_of(num_rows: int, stop_tokens: tuple[int, ...] = (), **settings) -> SamplingRows:
    """Return rows that differ only in their prompt; each setting is one value, or one per row."""
    fields: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(settings.pop(name, value), value.dtype), num_rows)
        for name, value in NEUTRAL.items()
    }
    assert not settings, f"no such settings: {sorted(settings)}"
    stops = np.full((num_rows, MAX_STOP_TOKENS), -1, np.int32)
    stops[:, : len(stop_tokens)] = stop_tokens
    return SamplingRows(**fields, prompt_index=np.arange(num_rows, dtype=np.uint32), stop_tokens=stops)


def drawn_from(
    logits: np.ndarray, sampling: SamplingRows, step: int = 0, position: int = POSITION, seen: tuple[int, ...] = ()
) -> np.ndarray:
    """Return the token drawn for each row; all sequences already contain the tokens `seen`."""
    num_rows, vocab = logits.shape
    bits = np.broadcast_to(seen_bits(seen, vocab), (num_rows, seen_words(vocab)))
    positions = np.full(num_rows, position, np.int32)
    return np.asarray(draw(logits.astype(np.float32), sampling, np.uint32(step), positions, bits))


@pytest.mark.parametrize(
    ("spread", "settings"),
    [
        (2.0, {}),
        (2.0, {"temperature": 0.5}),
        (1.0, {"temperature": 1.7}),
        (1.0, {"top_k": 1}),
        (2.0, {"top_k": 7}),
        (1.0, {"top_k": _TOP_TOKENS}),
        (1.0, {"top_k": _TOP_TOKENS + 1}),
        (2.0, {"top_k": 150, "temperature": 3.0}),
        (1.0, {"top_k": 333}),
        (1.0, {"top_k": 1000}),
        (2.0, {"top_p": 0.6, "temperature": 1.7}),
        (0.3, {"top_p": 0.95}),
        (3.0, {"top_p": 0.95}),
        (1.0, {"min_p": 0.3}),
        (2.0, {"min_p": 0.05, "temperature": 2.0}),
        (1.0, {"top_k": 20, "top_p": 0.8}),
        (0.3, {"top_k": 20, "top_p": 0.5, "min_p": 0.7, "temperature": 0.7}),
        (1.0, {"top_k": 100, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5}),
        (1.0, {"repetition_penalty": 1.8}),
        (2.0, {"repetition_penalty": 0.6}),
        (2.0, {"top_k": 100, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5, "repetition_penalty": 1.5}),
    ],
    ids=str,
)
def test_draws_follow_the_exact_filtered_distribution(spread: float, settings: dict) -> None:
    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * np.float32(spread)
    ranked = np.argsort(-logits)
    # Include likely tokens, otherwise the penalty would change little.
    seen, banned = (0, 31, 32, 332, *ranked[:10:2].tolist()), (3, int(ranked[1]))
    tokens = drawn_from(
        np.broadcast_to(logits, (NUM_DRAWS, VOCAB)),
        rows_of(NUM_DRAWS, stop_tokens=banned, first_stop=POSITION + 1, **settings),
        seen=seen,
    )
    probabilities = exact_probabilities(logits, seen=seen, banned=banned, **settings)
    require_draws_from(np.bincount(tokens, minlength=VOCAB), probabilities)


def test_tokens_as_likely_as_the_last_one_kept_are_kept():
    logits = np.repeat([*np.log([8, 4, 2, 1]), -np.inf], [1, 3, 100, 20, VOCAB - 124])
    # min_p is slightly below the ratios, which are rounded.
    several: list[dict] = [
        {"top_k": 2},
        {"top_k": 5},
        {"top_p": 0.03},
        {"top_p": 0.2},
        {"min_p": 0.499},
        {"min_p": 0.249},
    ]
    for settings in several:
        tokens = drawn_from(np.broadcast_to(logits, (NUM_DRAWS, VOCAB)), rows_of(NUM_DRAWS, **settings))
        require_draws_from(np.bincount(tokens, minlength=VOCAB), exact_probabilities(logits, **settings))


def kept_mask(weights: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    threshold = keep(weights, top_k, top_p, np.zeros(len(weights), np.float32))
    return weights >= np.asarray(threshold)[:, None]


@pytest.mark.parametrize("vocab", [1, 64, 65, 700])
def test_top_k_keeps_as_many_as_a_sort_would(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    weights = np.exp(rng.normal(size=(500, vocab)) * 3).astype(np.float32)
    weights[:250] = np.ceil(weights[:250])  # many are equal
    weights /= weights.max(axis=1, keepdims=True)
    top_k = rng.integers(0, 2 * vocab, 500, dtype=np.int32)
    last = np.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    expected = weights >= np.take_along_axis(np.sort(weights)[:, ::-1], last[:, None] - 1, axis=1)
    np.testing.assert_array_equal(kept_mask(weights, top_k, np.ones(500, np.float32)), expected)


@pytest.mark.parametrize("vocab", [1, 64, 700])
def test_top_p_keeps_the_smallest_sufficient_subset_of_what_top_k_keeps(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    weights = np.exp(rng.normal(size=(500, vocab)) * rng.uniform(0.1, 4, (500, 1))).astype(np.float32)
    weights /= weights.max(axis=1, keepdims=True)
    top_k = rng.integers(0, vocab + 2, 500, dtype=np.int32)
    top_p = rng.uniform(0.01, 1.0, 500).astype(np.float32)
    kept = kept_mask(weights, top_k, top_p)
    within = kept_mask(weights, top_k, np.ones(500, np.float32))
    wanted = top_p * np.sum(weights * within, axis=1, dtype=np.float64)
    assert not (kept & ~within).any()
    mass = np.sum(weights * kept, axis=1, dtype=np.float64)
    assert (mass >= wanted * (1 - 1e-5)).all()
    assert (mass - np.where(kept, weights, 2).min(axis=1) < wanted * (1 + 1e-5)).all()


def test_temperature_zero_draws_the_first_of_the_likeliest_tokens() -> None:
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert drawn_from(logits, rows_of(3, temperature=0)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("settings", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_a_filter_that_keeps_one_token_is_greedy(settings: dict) -> None:
    logits = np.random.default_rng(0).normal(size=(2000, 600))
    np.testing.assert_array_equal(drawn_from(logits, rows_of(2000, **settings)), logits.argmax(axis=-1))


@pytest.mark.parametrize(
    "vocab",
    [
        pytest.param(2400, id="slices_of_blocks_and_a_bit"),
        pytest.param(8 * _BLOCK, id="slices_of_whole_blocks", marks=pytest.mark.slow),
    ],
)
def test_slices_of_the_vocabulary_draw_the_same_tokens_as_the_whole(vocab: int) -> None:
    num_rows = 1000
    logits = np.random.default_rng(0).normal(size=(num_rows, vocab)).astype(np.float32)
    sampling = rows_of(num_rows, temperature=np.where(np.arange(num_rows) % 2, 0.7, 0))
    in_slices = jax.jit(functools.partial(draw_tokens, split=VocabSplit(parts=4)))
    nothing_seen = np.zeros((num_rows, seen_words(vocab)), np.uint32)
    tokens = in_slices(logits, sampling, np.uint32(0), np.full(num_rows, POSITION, np.int32), nothing_seen)
    np.testing.assert_array_equal(tokens, drawn_from(logits, sampling))


def test_the_penalty_divides_positive_logits_of_seen_tokens_and_multiplies_negative_ones():
    logits = np.array([[2.0, 1.5, -1.0, 0.0], [-3.0, -1.0, -1.5, -4.0], [0.0, 1.0, 1.5, 0.5]])

    def drawn(penalty: float | list[float], seen: tuple[int, ...]) -> list[int]:
        return drawn_from(logits, rows_of(3, temperature=0, repetition_penalty=penalty), seen=seen).tolist()

    assert drawn(2, ()) == [0, 1, 2]
    assert drawn(2, (0,)) == [1, 1, 2]
    assert drawn(2, (0, 1)) == [0, 2, 2]
    assert drawn(2, (2,)) == [0, 1, 1]
    assert drawn(0.25, (1, 3)) == [1, 1, 1]
    assert drawn([2, 1, 2], (0, 1, 2)) == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0, 1])
def test_stop_tokens_are_not_drawn_before_their_first_position(temperature: int) -> None:
    logits = np.broadcast_to(np.array([0.0, 30.0, 60.0, 90.0]), (3, 4))
    sampling = rows_of(3, stop_tokens=(3, 2), temperature=temperature, first_stop=[9, 8, 0])
    assert drawn_from(logits, sampling, position=7).tolist() == [1, 1, 3]
    assert drawn_from(logits, sampling, position=8).tolist() == [1, 3, 3]
    assert drawn_from(logits, sampling, position=9).tolist() == [3, 3, 3]


def test_neither_missing_stop_tokens_nor_ones_beyond_the_vocabulary_ban_anything():
    logits = np.array([[1.0, 0.0, 0.0, 5.0], [5.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for stop_tokens in ((), (4, 50)):
        sampling = rows_of(3, stop_tokens=stop_tokens, temperature=0, first_stop=100)
        assert drawn_from(logits, sampling).tolist() == [3, 0, 0]


def test_a_vocabulary_of_one_token_draws_it_even_if_it_is_banned():
    for temperature in (0, 1):
        for first_stop in (0, 100):
            sampling = rows_of(3, (0,), temperature=temperature, first_stop=first_stop, top_k=5, top_p=0.5, min_p=0.5)
            assert drawn_from(np.full((3, 1), -2.5), sampling, seen=(0,)).tolist() == [0, 0, 0]


KINDS = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0, "first_stop": 100},
    {"temperature": 0, "top_k": 100, "top_p": 0.3, "min_p": 0.5},
    {},
    {"temperature": 2.5, "repetition_penalty": 0.7},
    {"first_stop": 100},
    {"top_p": 0.4},
    {"top_p": 0.99, "temperature": 2},
    {"top_k": 5},
    {"top_k": 180, "temperature": 4},
    {"top_k": 180, "top_p": 0.9, "temperature": 4},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "first_stop": 100},
    {"logprobs": 5},
)


def test_no_token_depends_on_the_other_rows():
    vocab, stop_tokens, seen = 300, (7, 299), tuple(range(0, 300, 3))
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(8, vocab)) * np.linspace(0.3, 3, 8)[:, None]).astype(np.float32)

    def drawn(kinds: np.ndarray, contexts: np.ndarray) -> np.ndarray:
        settings = {
            name: [KINDS[kind].get(name, default) for kind in kinds]
            for name, default in NEUTRAL.items()
            if name not in ("seed", "sample_index")
        }
        sampling = rows_of(len(kinds), stop_tokens, **settings)
        sampling = dataclasses.replace(sampling, prompt_index=(kinds * 8 + contexts).astype(np.uint32))
        return drawn_from(logits[contexts], sampling, seen=seen)

    alone = np.array([[drawn(np.array([kind]), np.array([row]))[0] for row in range(8)] for kind in range(len(KINDS))])
    assert len(np.unique(alone)) > 30
    for _ in range(100):
        # Some batches have few kinds and others all, so different computations are skipped.
        some = rng.choice(len(KINDS), rng.integers(1, len(KINDS) + 1))
        kinds, contexts = rng.choice(some, 16), rng.integers(0, 8, 16)
        np.testing.assert_array_equal(drawn(kinds, contexts), alone[kinds, contexts])


def test_a_token_depends_on_every_part_of_its_key() -> None:
    logits = np.zeros((2000, 600), np.float32)
    base = rows_of(2000)
    tokens = drawn_from(logits, base)
    np.testing.assert_array_equal(tokens, drawn_from(logits, base))
    others = [
        drawn_from(logits, rows_of(2000, seed=1)),
        drawn_from(logits, base, step=1),
        drawn_from(logits, base, position=8),
        drawn_from(logits, rows_of(2000, sample_index=1)),
        np.roll(tokens, 1),  # another prompt index
    ]
    for other in others:
        assert np.mean(tokens == other) < 0.05


def test_a_token_with_zero_weight_is_never_drawn() -> None:
    logits = np.full((2000, 600), -np.inf, np.float32)
    logits[:, [0, 255, 256, 511]] = 0.0
    tokens = drawn_from(logits, rows_of(2000))
    assert set(tokens.tolist()) == {0, 255, 256, 511}


def test_rounding_at_block_boundaries_never_draws_a_token_with_zero_weight():
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((256, 20 * _BLOCK)) < 0.9, 0, rng.random((256, 20 * _BLOCK))).astype(np.float32)
    ends = np.cumsum(weights.reshape(256, 20, _BLOCK).sum(axis=-1, dtype=np.float32), axis=-1, dtype=np.float32)
    invert = jax.jit(_inverse_cdf)
    for block in range(19):
        border = ends[:, block] / ends[:, -1]
        for uniform in (np.nextafter(border, np.float32(0)), border, np.nextafter(border, np.float32(1))):
            drawn = np.asarray(invert(weights, uniform.astype(np.float32)))
            assert (weights[np.arange(256), drawn] > 0).all()
