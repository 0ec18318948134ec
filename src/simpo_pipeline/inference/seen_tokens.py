"""Which tokens each row's prompt and completion hold, one bit a token of the vocabulary.

Token `t` is bit `t % 32` of word `t // 32`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

_WORD_BITS = 32


def seen_words(vocab_size: int) -> int:
    """Words that hold one bit for each token."""
    return -(-vocab_size // _WORD_BITS)


def seen_bits(token_ids: Sequence[int] | Int[np.ndarray, " tokens"], vocab_size: int) -> UInt32[np.ndarray, " words"]:
    """The bits of the given tokens, which lie in [0, vocab_size), on the host."""
    bits = np.zeros(seen_words(vocab_size) * _WORD_BITS, np.uint8)
    bits[np.asarray(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def mark_seen(
    seen: UInt32[Array, "rows words"], tokens: Int[Array, " rows"], rows_alive: Bool[Array, " rows"]
) -> UInt32[Array, "rows words"]:
    """`seen` with the bit of each living row's token set; the tokens of other rows may be anything."""
    rows = jnp.arange(seen.shape[0], dtype=jnp.int32)
    words = tokens // _WORD_BITS
    # No bit where a row has ended: its word stays as it is, and one that does not exist is dropped.
    bits = rows_alive.astype(jnp.uint32) << (tokens % _WORD_BITS).astype(jnp.uint32)
    return seen.at[rows, words].set(seen[rows, words] | bits)


def is_seen(seen: UInt32[Array, "rows words"], vocab_size: int) -> Bool[Array, "rows vocab"]:
    """Whether each token's bit is set."""
    places = jnp.arange(_WORD_BITS, dtype=jnp.uint32)[None, None]
    bits = (seen[:, :, None] >> places) & jnp.uint32(1)
    return bits.reshape(seen.shape[0], -1)[:, :vocab_size] == 1
