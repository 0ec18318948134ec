"""Drawing the next token of every row of a batch, inside a device program.

Each row has parameters and a key of its own, and no row's token depends on another row. The key is folded from
seed, step, prompt index, sample index and position, so a token does not depend on when or beside whom it is drawn.
The vocabulary is never sorted: a pass over 49,152 logits costs a hundredth of a sort on CPU.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

# Nearly every nucleus lies within so many of the likeliest tokens; the others are found by bisection.
_TOP_TOKENS = 64
# Width of the blocks by which the vocabulary is searched.
_BLOCK = 256
# Bisection over the bit patterns of floats in [0, 1].
_ONE_AS_BITS = 0x3F800000
_BISECTIONS = 30


class SamplingRows(eqx.Module):
    """How each row draws; one entry a row."""

    temperature: Float[Array | np.ndarray, " rows"]
    top_p: Float[Array | np.ndarray, " rows"]
    seed: UInt32[Array | np.ndarray, " rows"]
    prompt_index: UInt32[Array | np.ndarray, " rows"]
    sample_index: UInt32[Array | np.ndarray, " rows"]


def draw_tokens(
    logits: Float[Array, "rows vocab"],
    sampling: SamplingRows,
    step: UInt32[Array, ""],
    positions: Int[Array, " rows"],
) -> Int[Array, " rows"]:
    """The token at `positions[r]` of each row's sequence, from fp32 logits.

    A row with temperature 0 takes the likeliest token, the first of equals. Others draw from softmax(logits /
    temperature) cut to its nucleus: the smallest set of likeliest tokens whose probabilities sum to at least `top_p`,
    tokens as likely as its last one included.
    """
    samples = jnp.asarray(sampling.temperature) > 0
    top_p = jnp.asarray(sampling.top_p)

    def drawn() -> Int[Array, " rows"]:
        indices = jnp.stack([sampling.seed, sampling.prompt_index, sampling.sample_index])
        uniform = jax.vmap(_uniform, in_axes=(1, None, 0))(indices, step, positions)
        temperature = jnp.where(samples, sampling.temperature, 1)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = _nucleus(jnp.exp((logits - peak) / temperature[:, None]), top_p, samples)
        return jnp.where(samples, _inverse_cdf(weights, uniform), _likeliest(logits))

    return lax.cond(jnp.any(samples), drawn, lambda: _likeliest(logits))


def _uniform(
    seed_prompt_sample: UInt32[Array, "3"], step: UInt32[Array, ""], position: Int[Array, ""]
) -> Float[Array, ""]:
    """A number in [0, 1) that belongs to one token alone."""
    seed, prompt_index, sample_index = seed_prompt_sample
    key = jax.random.key(seed, impl="threefry2x32")
    for part in (step, prompt_index, sample_index, position.astype(jnp.uint32)):
        key = jax.random.fold_in(key, part)
    return jax.random.uniform(key)


def _likeliest(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    # The likeliest block first, then within it: on CPU a fifth of the time of one jnp.argmax over the vocabulary.
    blocks = _blocks(logits, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    within = jnp.argmax(_block_of_each_row(blocks, block), axis=-1)
    return (block * _BLOCK + within).astype(jnp.int32)


def _nucleus(
    weights: Float[Array, "rows vocab"], top_p: Float[Array, " rows"], samples: Array
) -> Float[Array, "rows vocab"]:
    """The weights (largest 1) of the nucleus, 0 elsewhere."""
    cuts = samples & (top_p < 1)

    def cut() -> Float[Array, "rows vocab"]:
        wanted = top_p * jnp.sum(weights, axis=-1)
        top, _ = lax.top_k(weights, min(_TOP_TOKENS, weights.shape[1]))
        mass = jnp.cumsum(top, axis=-1)
        within_top = mass[:, -1] >= wanted
        last = jnp.minimum(jnp.sum(mass < wanted[:, None], axis=-1), top.shape[1] - 1)
        threshold = jnp.take_along_axis(top, last[:, None], axis=-1)[:, 0]
        # Which rows bisect depends on each row alone; the condition only spares the work when none does.
        threshold = lax.cond(
            jnp.all(within_top | ~cuts),
            lambda: threshold,
            lambda: jnp.where(within_top, threshold, _bisected_threshold(weights, wanted)),
        )
        return jnp.where((weights >= threshold[:, None]) | ~cuts[:, None], weights, 0)

    return lax.cond(jnp.any(cuts), cut, lambda: weights)


def _bisected_threshold(weights: Float[Array, "rows vocab"], wanted: Float[Array, " rows"]) -> Float[Array, " rows"]:
    """The largest threshold such that the weights at or above it sum to at least `wanted`, exactly."""

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough weight at low, too little at high, as bits: the order of positive floats
        middle = (low + high) // 2
        threshold = lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(weights >= threshold[:, None], weights, 0), axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(weights.shape[:1], jnp.int32)
    low, _ = lax.fori_loop(0, _BISECTIONS, halve, (low, low + (_ONE_AS_BITS + 1)))
    return lax.bitcast_convert_type(low, jnp.float32)


def _inverse_cdf(weights: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """The token at which the running sum of the weights passes uniform * their sum: a block first, then within it."""
    blocks = _blocks(weights, 0.0)
    block_sums = jnp.sum(blocks, axis=-1)
    block_ends = jnp.cumsum(block_sums, axis=-1)
    target = uniform * block_ends[:, -1]
    block = _first_past(block_sums, block_ends, target)
    start = jnp.take_along_axis(block_ends - block_sums, block[:, None], axis=-1)[:, 0]
    inside = _block_of_each_row(blocks, block)
    return block * _BLOCK + _first_past(inside, jnp.cumsum(inside, axis=-1), target - start)


def _first_past(
    weights: Float[Array, "rows n"], ends: Float[Array, "rows n"], target: Float[Array, " rows"]
) -> Int[Array, " rows"]:
    """The first place with any weight whose running sum exceeds the target; if rounding leaves none, the last.

    Rounding may also put the target below the start of the row, where places without weight would pass it.
    """
    places = jnp.arange(weights.shape[1], dtype=jnp.int32)[None]
    has_weight = weights > 0
    passes = (ends > target[:, None]) & has_weight
    last = jnp.max(jnp.where(has_weight, places, 0), axis=-1)
    return jnp.where(jnp.any(passes, axis=-1), jnp.argmax(passes, axis=-1).astype(jnp.int32), last)


def _blocks(x: Float[Array, "rows vocab"], fill: float) -> Float[Array, "rows blocks block_size"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK)), constant_values=fill).reshape(x.shape[0], -1, _BLOCK)


def _block_of_each_row(
    blocks: Float[Array, "rows blocks block_size"], block: Int[Array, " rows"]
) -> Float[Array, "rows block_size"]:
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
