"""Filters of the tokens that a row may sample: top_k, top_p and min_p, and the changes to logits before them.

Every filter keeps the weights at or above a threshold, so all filters combine to one threshold per row, the largest.
The vocabulary is never sorted. Expensive operations run only if some row needs them; the values of a row depend only on
that row.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from simpo_pipeline.inference.seen_tokens import is_seen

# Number of most likely tokens that contain nearly every nucleus; thresholds of larger sets are found by bisection.
_TOP_TOKENS = 64
# Bisection over the bit patterns of floats in [0, 1].
_ONE_AS_BITS = 0x3F800000
_BISECTIONS = 30


def penalised(
    logits: Float[Array, "rows vocab"], penalty: Float[Array, " rows"], seen: UInt32[Array, "rows words"]
) -> Float[Array, "rows vocab"]:
    """Apply the repetition penalty to seen tokens: divide positive logits by it, multiply negative logits by it."""

    def penalise() -> Float[Array, "rows vocab"]:
        by_row = penalty[:, None]
        changed = jnp.where(logits > 0, logits / by_row, logits * by_row)
        return jnp.where(is_seen(seen, logits.shape[1]), changed, logits)

    return lax.cond(jnp.any(penalty != 1), penalise, lambda: logits)


def without_stops(
    logits: Float[Array, "rows vocab"], stop_tokens: Int[Array, "rows max_stop_tokens"], banned: Bool[Array, " rows"]
) -> Float[Array, "rows vocab"]:
    """Set the logits of the stop tokens (-1 for padding) to -inf in rows where they are banned."""
    bans = banned[:, None] & (stop_tokens >= 0)

    def ban() -> Float[Array, "rows vocab"]:
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        # An index past the vocabulary is dropped.
        indices = jnp.where(bans, stop_tokens, logits.shape[1])
        return logits.at[rows, indices].set(-jnp.inf, mode="drop")

    return lax.cond(jnp.any(bans), ban, lambda: logits)


def kept_threshold(
    weights: Float[Array, "rows vocab"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
) -> Float[Array, " rows"]:
    """Return the weight at or above which tokens are kept.

    `weights` are exp((logit - peak) / temperature), so the largest weight is 1. `top_k` is the number of most likely
    tokens to keep (0: all). `top_p` then keeps the smallest set of most likely tokens whose weights sum to at least
    this fraction of the weights that top_k kept (1: all). `min_p` keeps tokens with at least this fraction of the
    largest weight (0: all).
    """
    cuts_k, cuts_p = (top_k > 0) & (top_k < weights.shape[1]), top_p < 1

    def cut() -> Float[Array, " rows"]:
        top, _ = lax.top_k(weights, min(_TOP_TOKENS, weights.shape[1]))
        by_top_k = jnp.where(cuts_k, _top_k_threshold(weights, top, top_k, cuts_k), 0)
        by_top_p = lax.cond(
            jnp.any(cuts_p),
            lambda: jnp.where(cuts_p, _top_p_threshold(weights, top, top_p, cuts_p, by_top_k), 0),
            lambda: jnp.zeros_like(by_top_k),
        )
        return jnp.maximum(by_top_k, by_top_p)

    return jnp.maximum(min_p, lax.cond(jnp.any(cuts_k | cuts_p), cut, lambda: jnp.zeros_like(min_p)))


def _top_k_threshold(
    weights: Float[Array, "rows vocab"],
    top: Float[Array, "rows top"],
    top_k: Int[Array, " rows"],
    cuts: Bool[Array, " rows"],
) -> Float[Array, " rows"]:
    """Return the `top_k`th largest weight of each row with `cuts`; `top` has the largest ones in decreasing order."""
    within_top = top_k <= top.shape[1]
    last = jnp.clip(top_k, 1, top.shape[1]) - 1
    threshold = jnp.take_along_axis(top, last[:, None], axis=-1)[:, 0]

    def enough(threshold: Float[Array, " rows"]) -> Bool[Array, " rows"]:
        return jnp.sum(weights >= threshold[:, None], axis=-1, dtype=jnp.int32) >= top_k

    return _bisected_unless(within_top, threshold, enough, cuts)


def _top_p_threshold(
    weights: Float[Array, "rows vocab"],
    top: Float[Array, "rows top"],
    top_p: Float[Array, " rows"],
    cuts: Bool[Array, " rows"],
    by_top_k: Float[Array, " rows"],
) -> Float[Array, " rows"]:
    """Return the smallest weight of the nucleus of each row with `cuts`, among the weights at or above `by_top_k`."""

    def mass_from(threshold: Float[Array, " rows"]) -> Float[Array, " rows"]:
        return jnp.sum(jnp.where(weights >= threshold[:, None], weights, 0), axis=-1)

    wanted = top_p * mass_from(by_top_k)
    # Tokens that top_k excludes come after those it keeps, so they only count if rounding makes `wanted` exceed the
    # kept mass.
    mass = jnp.cumsum(top, axis=-1)
    within_top = mass[:, -1] >= wanted
    last = jnp.minimum(jnp.sum(mass < wanted[:, None], axis=-1), top.shape[1] - 1)
    threshold = jnp.take_along_axis(top, last[:, None], axis=-1)[:, 0]
    return _bisected_unless(within_top, threshold, lambda threshold: mass_from(threshold) >= wanted, cuts)


def _bisected_unless(
    known: Bool[Array, " rows"],
    threshold: Float[Array, " rows"],
    enough: Callable[[Float[Array, " rows"]], Bool[Array, " rows"]],
    cuts: Bool[Array, " rows"],
) -> Float[Array, " rows"]:
    """Return the threshold where it is known, otherwise exactly the largest one in [0, 1] that keeps enough."""
    # Whether a row needs bisection depends only on that row; the condition skips the work if no row does.
    return lax.cond(
        jnp.all(known | ~cuts),
        lambda: threshold,
        lambda: jnp.where(known, threshold, _largest_enough(enough, threshold.shape[0])),
    )


def _largest_enough(
    enough: Callable[[Float[Array, " rows"]], Bool[Array, " rows"]], num_rows: int
) -> Float[Array, " rows"]:
    """Return the largest threshold in [0, 1] that keeps enough, assuming that 0 does and that larger ones keep less."""

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # bit patterns, ordered like positive floats; low keeps enough, high does not
        middle = (low + high) // 2
        keeps = enough(lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(keeps, middle, low), jnp.where(keeps, high, middle)

    low = jnp.zeros(num_rows, jnp.int32)
    low, _ = lax.fori_loop(0, _BISECTIONS, halve, (low, low + (_ONE_AS_BITS + 1)))
    return lax.bitcast_convert_type(low, jnp.float32)
