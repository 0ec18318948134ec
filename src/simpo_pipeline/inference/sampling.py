"""Sampling of the next token of every row of a batch, inside a device program.

Each row has its own parameters and its own key, and no row's token depends on another row. The key is derived from
seed, step, prompt index, sample index and position, so a token does not depend on when or in which batch it is sampled.
The vocabulary is never sorted: on CPU, a pass over 49,152 logits takes a hundredth of the time of a sort.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from simpo_pipeline.inference.logit_adjustments import LogitAdjustments, biased, less_repeated
from simpo_pipeline.inference.token_filters import kept_threshold, penalised, without_stops

# Block size of the two-level search over the vocabulary.
_BLOCK = 256


class VocabSplit(NamedTuple):
    """Sharding of logits over devices: `parts` equal slices of the vocabulary, so that each device searches its own."""

    parts: int = 1
    whole: Callable[[Array], Array] = lambda array: array  # replicates an array over all devices


# Logits that are on one device, or replicated.
UNSPLIT = VocabSplit()


class SamplingRows(eqx.Module):
    """Sampling parameters, one entry per row; names as in `SamplingParams`."""

    temperature: Float[Array | np.ndarray, " rows"]
    top_p: Float[Array | np.ndarray, " rows"]
    top_k: Int[Array | np.ndarray, " rows"]  # 0 keeps every token
    min_p: Float[Array | np.ndarray, " rows"]
    repetition_penalty: Float[Array | np.ndarray, " rows"]  # 1 disables it
    seed: UInt32[Array | np.ndarray, " rows"]
    prompt_index: UInt32[Array | np.ndarray, " rows"]
    sample_index: UInt32[Array | np.ndarray, " rows"]
    first_stop: Int[Array | np.ndarray, " rows"]  # stop tokens are banned at positions below this
    stop_tokens: Int[Array | np.ndarray, "rows max_stop_tokens"]  # -1 past the last one
    logprobs: Int[Array | np.ndarray, " rows"]  # number of most likely tokens to report; -1: no logprobs
    adjustments: LogitAdjustments | None = None  # None in programs for rows that have none


def draw_tokens(
    logits: Float[Array, "rows vocab"],
    sampling: SamplingRows,
    step: UInt32[Array, ""],
    positions: Int[Array, " rows"],
    seen: UInt32[Array, "rows words"],
    split: VocabSplit = UNSPLIT,
    counts: Int[Array, "rows vocab"] | None = None,
) -> Int[Array, " rows"]:
    """Sample the token (int32) at `positions[r]` of each row r's sequence, from fp32 logits.

    First, logits are adjusted (`counts` are those of generated tokens, None without adjustments), seen tokens are
    penalised and early stop tokens are banned. A row with temperature 0 then selects the most likely token, the first
    one of ties. Other rows sample from softmax(logits / temperature), filtered by top_k, top_p and min_p in this order.
    Each filter also keeps tokens that tie with the least likely token it keeps. A row whose tokens are all banned
    selects token 0.
    """
    is_random = jnp.asarray(sampling.temperature) > 0
    if sampling.adjustments is not None:
        logits = biased(logits, sampling.adjustments)
    logits = penalised(logits, jnp.asarray(sampling.repetition_penalty), seen)
    if sampling.adjustments is not None and counts is not None:
        logits = less_repeated(logits, sampling.adjustments, counts)
    logits = without_stops(logits, jnp.asarray(sampling.stop_tokens), positions < jnp.asarray(sampling.first_stop))

    def drawn() -> Int[Array, " rows"]:
        indices = jnp.stack([sampling.seed, sampling.prompt_index, sampling.sample_index])
        uniform = split.whole(jax.vmap(_uniform, in_axes=(1, None, 0))(indices, step, positions))
        return jnp.where(is_random, _inverse_cdf(_weights(logits, sampling), uniform, split), _argmax(logits, split))

    # `preflight` uses this name to find out which branch a job takes.
    with jax.named_scope("draw"):
        return lax.cond(jnp.any(is_random), drawn, lambda: _argmax(logits, split))


def are_finite(logits: Float[Array, "rows vocab"], active: Bool[Array, " rows"]) -> Bool[Array, " rows"]:
    """Return whether every logit of a row is finite. Rows that are not active may get either answer.

    A sum that contains NaN or infinities is one of them. On CPU it takes a hundredth of the time of the matmul before
    it; looking at each logit takes several times as long, and is only needed if a sum is not finite.
    """
    sums = jnp.isfinite(jnp.sum(logits, axis=-1))
    # The sum of huge finite logits may overflow.
    return lax.cond(jnp.all(sums | ~active), lambda: sums, lambda: jnp.all(jnp.isfinite(logits), axis=-1))


def _weights(logits: Float[Array, "rows vocab"], sampling: SamplingRows) -> Float[Array, "rows vocab"]:
    """Return unnormalized probabilities: 1 for the most likely token, 0 for tokens that the filters exclude."""
    is_random = jnp.asarray(sampling.temperature) > 0
    temperature = jnp.where(is_random, sampling.temperature, 1)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp((logits - peak) / temperature[:, None])
    # Greedy rows must not enable filters that no other row needs.
    threshold = kept_threshold(
        weights,
        top_k=jnp.where(is_random, sampling.top_k, 0),
        top_p=jnp.where(is_random, sampling.top_p, 1),
        min_p=jnp.where(is_random, sampling.min_p, 0),
    )
    # If no row is filtered, the comparison alone would add half the time of the rest of sampling.
    return lax.cond(
        jnp.any(threshold > 0), lambda: jnp.where(weights >= threshold[:, None], weights, 0), lambda: weights
    )


def _uniform(
    seed_prompt_sample: UInt32[Array, "3"], step: UInt32[Array, ""], position: Int[Array, ""]
) -> Float[Array, ""]:
    """Return a uniform value in [0, 1) from the key of one token."""
    seed, prompt_index, sample_index = seed_prompt_sample
    key = jax.random.key(seed, impl="threefry2x32")
    for part in (step, prompt_index, sample_index, position.astype(jnp.uint32)):
        key = jax.random.fold_in(key, part)
    return jax.random.uniform(key)


def _argmax(logits: Float[Array, "rows vocab"], split: VocabSplit) -> Int[Array, " rows"]:
    # Find the best block, then the best token in it: on CPU a fifth of the time of one jnp.argmax over the vocabulary.
    blocks = _blocks(logits, -jnp.inf, split)
    block = jnp.argmax(split.whole(jnp.max(blocks, axis=-1)), axis=-1)
    within = jnp.argmax(split.whole(_block_of_each_row(blocks, block)), axis=-1)
    return _token(block, within, logits.shape[1], split)


def _inverse_cdf(
    weights: Float[Array, "rows vocab"], uniform: Float[Array, " rows"], split: VocabSplit = UNSPLIT
) -> Int[Array, " rows"]:
    """Return the token at which the cumulative sum of the weights exceeds uniform * total, by a two-level search."""
    blocks = _blocks(weights, 0.0, split)
    block_sums = split.whole(jnp.sum(blocks, axis=-1))
    block_ends = jnp.cumsum(block_sums, axis=-1)
    target = uniform * block_ends[:, -1]
    block = _first_past(block_sums, block_ends, target)
    start = jnp.take_along_axis(block_ends - block_sums, block[:, None], axis=-1)[:, 0]
    inside = split.whole(_block_of_each_row(blocks, block))
    return _token(block, _first_past(inside, jnp.cumsum(inside, axis=-1), target - start), weights.shape[1], split)


def _first_past(
    weights: Float[Array, "rows n"], ends: Float[Array, "rows n"], target: Float[Array, " rows"]
) -> Int[Array, " rows"]:
    """Return the first index with a positive weight whose cumulative sum exceeds the target.

    If rounding leaves no such index, return the last one with a positive weight. Rounding may also put the target below
    the start of the row; therefore indices of weight 0 are excluded explicitly.
    """
    indices = jnp.arange(weights.shape[1], dtype=jnp.int32)[None]
    has_weight = weights > 0
    passes = (ends > target[:, None]) & has_weight
    last = jnp.max(jnp.where(has_weight, indices, 0), axis=-1)
    return jnp.where(jnp.any(passes, axis=-1), jnp.argmax(passes, axis=-1).astype(jnp.int32), last)


def _blocks(x: Float[Array, "rows vocab"], fill: float, split: VocabSplit) -> Float[Array, "rows blocks block_size"]:
    """Return the blocks of each vocabulary slice in order; the last block of each slice is padded with `fill`."""
    slices = x.reshape(x.shape[0], split.parts, -1)
    padded = jnp.pad(slices, ((0, 0), (0, 0), (0, -slices.shape[2] % _BLOCK)), constant_values=fill)
    return padded.reshape(x.shape[0], -1, _BLOCK)


def _token(
    block: Int[Array, " rows"], within: Int[Array, " rows"], vocab_size: int, split: VocabSplit
) -> Int[Array, " rows"]:
    """Return the token id at index `within` of a block of `_blocks`."""
    slice_size = vocab_size // split.parts
    part, block_of_part = jnp.divmod(block, math.ceil(slice_size / _BLOCK))
    return (part * slice_size + block_of_part * _BLOCK + within).astype(jnp.int32)


def _block_of_each_row(
    blocks: Float[Array, "rows blocks block_size"], block: Int[Array, " rows"]
) -> Float[Array, "rows block_size"]:
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
