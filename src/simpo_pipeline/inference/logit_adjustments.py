"""Changes to the logits of single tokens: biases, and penalties for tokens that a completion already contains.

Unlike the repetition penalty, these penalties count the generated tokens, which takes an integer per token of the
vocabulary. Programs without `LogitAdjustments` do none of this work, and are the same as if this module did not exist.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Of an fp32: all bits but the lower 12 of the 24 digits.
_HIGH_DIGITS = ~0xFFF


class LogitAdjustments(eqx.Module):
    """Adjustments, one entry per row; names as in `SamplingParams`."""

    presence_penalty: Float[Array | np.ndarray, " rows"]  # 0 disables it
    frequency_penalty: Float[Array | np.ndarray, " rows"]  # 0 disables it
    bias_tokens: Int[Array | np.ndarray, "rows max_logit_bias"]  # -1 past the last one
    biases: Float[Array | np.ndarray, "rows max_logit_bias"]
    generated: Int[Array | np.ndarray, "rows max_seq_len"]  # tokens generated before this round; -1 past the last one


def first_counts(adjustments: LogitAdjustments, vocab_size: int) -> Int[Array, "rows vocab"]:
    """Return how often each token of the vocabulary was generated before this round."""
    generated = jnp.asarray(adjustments.generated)
    counts = jnp.zeros((generated.shape[0], vocab_size), jnp.int32)
    return counts.at[_rows(generated), _dropped_if_absent(generated, vocab_size)].add(1, mode="drop")


def counted(
    counts: Int[Array, "rows vocab"], tokens: Int[Array, " rows"], rows_alive: Bool[Array, " rows"]
) -> Int[Array, "rows vocab"]:
    """Return `counts` with the token of each active row added; the tokens of other rows are arbitrary."""
    rows = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return counts.at[rows, tokens].add(rows_alive.astype(jnp.int32), mode="drop")


def biased(logits: Float[Array, "rows vocab"], adjustments: LogitAdjustments) -> Float[Array, "rows vocab"]:
    """Add each row's biases to the logits of their tokens."""
    tokens = jnp.asarray(adjustments.bias_tokens)
    indices = _dropped_if_absent(tokens, logits.shape[1])
    return logits.at[_rows(tokens), indices].add(jnp.asarray(adjustments.biases), mode="drop")


def less_repeated(
    logits: Float[Array, "rows vocab"], adjustments: LogitAdjustments, counts: Int[Array, "rows vocab"]
) -> Float[Array, "rows vocab"]:
    """Subtract the frequency penalty for each time that a token was generated, and the presence penalty once."""
    once = jnp.where(counts > 0, jnp.asarray(adjustments.presence_penalty)[:, None], 0)
    return logits - _product(jnp.asarray(adjustments.frequency_penalty)[:, None], counts.astype(jnp.float32)) - once


def _product(penalty: Float[Array, "rows 1"], counts: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
    """Return penalty * counts, rounded as a product alone.

    A backend may fuse a product with the sum or difference that it is used in, and then rounds only once; whether it
    does may differ between programs. The products of halves of the penalty's digits are exact up to counts of 4,096, so
    that fusing them changes nothing.
    """
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(penalty, jnp.int32) & _HIGH_DIGITS, jnp.float32)
    return high * counts + (penalty - high) * counts


def _rows(tokens: Int[Array, "rows tokens"]) -> Int[Array, "rows 1"]:
    return jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]


def _dropped_if_absent(tokens: Int[Array, "rows tokens"], vocab_size: int) -> Int[Array, "rows tokens"]:
    """Return the tokens as indices; those that are -1 become an index past the vocabulary, which is dropped."""
    return jnp.where(tokens >= 0, tokens, vocab_size)
