"""The definition of paged attention: every query attends over its whole page table row, masked. For tests."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages


@dataclasses.dataclass(frozen=True)
class ReferencePagedAttention:
    """`PagedAttention` in its simplest form. Values that no query attends to may be anything, including NaN."""

    name: ClassVar[str] = "reference"
    default_page_size: ClassVar[int] = 1
    keys_per_block: ClassVar[int | None] = None
    kv_heads_axis: ClassVar[int] = 2

    def empty(self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> Pages:
        """Return two arrays of zeros of `dtype`, keys and values: [pages, page_size, kv_heads, head_size]."""
        shape = (num_pages, page_size, kv_heads, head_size)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def write(self, pages: Pages, tokens: NewTokens) -> Pages:
        """See `PagedAttention.write`."""
        keys, values = pages
        at = tokens.page, tokens.slot
        return keys.at[at].set(tokens.k, mode="drop"), values.at[at].set(tokens.v, mode="drop")

    def copy(self, pages: Pages, source: Int[Array, " n"], target: Int[Array, " n"]) -> Pages:
        """See `PagedAttention.copy`."""
        return tuple(array.at[target].set(array[source], mode="drop") for array in pages)

    def attend(
        self, q: Float[Array, "tokens heads head_size"], pages: Pages, sequences: PagedSequences
    ) -> Float[Array, "tokens heads head_size"]:
        """See `PagedAttention.attend`."""
        keys, values = pages
        num_tokens, _, head_size = q.shape
        owner, position = _owners(sequences, num_tokens)
        flat = (num_tokens, -1, *keys.shape[2:])
        pages_of = sequences.page_table[owner]
        k, v = keys[pages_of].reshape(flat), values[pages_of].reshape(flat)
        seen = jnp.arange(k.shape[1])[None] <= position[:, None]
        # A slot that is masked for a query may contain anything, and 0 * NaN is NaN.
        v = jnp.where(seen[:, :, None, None], v, 0).astype(jnp.float32)
        grouped = q.reshape(num_tokens, k.shape[2], -1, head_size)
        scores = jnp.einsum("nkgd,ntkd->nkgt", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(head_size)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        exponentials = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, initial=-1e30))
        weights = exponentials / jnp.maximum(jnp.sum(exponentials, axis=-1, keepdims=True), 1)
        return jnp.einsum("nkgt,ntkd->nkgd", weights, v).reshape(q.shape).astype(q.dtype)


def _owners(sequences: PagedSequences, num_tokens: int) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"]]:
    """Return the sequence of each token, and the token's position in it (-1 for padding)."""
    query_starts, kv_lens = sequences.query_starts, sequences.kv_lens
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(tokens[:, None] >= query_starts[None, 1:], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, kv_lens.shape[0] - 1)
    from_end = query_starts[owner + 1] - tokens
    return owner, jnp.where(tokens < query_starts[-1], kv_lens[owner] - from_end, -1)
