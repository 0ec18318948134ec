"""Bit sets of the tokens in each row's prompt and completion, one bit per token of the vocabulary.

Token `t` is bit `t % 32` of word `t // 32`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

_WORD_BITS = 32


def seen_words(vocab_size: int) -> int:
    """Return the number of words for one bit per token."""
    return -(-vocab_size // _WORD_BITS)


def seen_bits(token_ids: Sequence[int] | Int[np.ndarray, " tokens"], vocab_size: int) -> UInt32[np.ndarray, " words"]:
    """Return the bit set of the given tokens, each in [0, vocab_size); runs on the host."""
    bits = np.zeros(seen_words(vocab_size) * _WORD_BITS, np.uint8)
    bits[np.asarray(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def mark_seen(
    seen: UInt32[Array, "rows words"], tokens: Int[Array, " rows"], rows_alive: Bool[Array, " rows"]
) -> UInt32[Array, "rows words"]:
    """Return `seen` with the bit of each active row's token set; the tokens of other rows are arbitrary."""
    rows = jnp.arange(seen.shape[0], dtype=jnp.int32)
    words = tokens // _WORD_BITS
    # Finished rows set no bit: their word is written back unchanged, and an out-of-range index is dropped.
    bits = rows_alive.astype(jnp.uint32) << (tokens % _WORD_BITS).astype(jnp.uint32)
    return seen.at[rows, words].set(seen[rows, words] | bits)


def is_seen(seen: UInt32[Array, "rows words"], vocab_size: int) -> Bool[Array, "rows vocab"]:
    """Return whether each token's bit is set."""
    shifts = jnp.arange(_WORD_BITS, dtype=jnp.uint32)[None, None]
    bits = (seen[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(seen.shape[0], -1)[:, :vocab_size] == 1
