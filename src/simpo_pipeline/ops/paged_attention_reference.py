"""The definition of paged attention: every query attends over its whole page table row, masked. For tests."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class ReferencePagedAttention:
    """`PagedAttention` in its simplest form. Values that no query attends to may be anything, including NaN."""

    name: ClassVar[str] = "reference"
    default_page_size: ClassVar[int] = 1
    keys_per_block: ClassVar[int | None] = None
    kv_heads_axis: ClassVar[int] = 2

    def empty(
        self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """Return two arrays of zeros of `dtype`, keys and values: [pages, page_size, kv_heads, head_size]."""
        shape = (num_pages, page_size, kv_heads, head_size)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def write(
        self,
        pages: tuple[Shaped[Array, "pages ..."], ...],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        page: Int[Array, " tokens"],
        slot: Int[Array, " tokens"],
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """See `PagedAttention.write`."""
        keys, values = pages
        return keys.at[page, slot].set(k, mode="drop"), values.at[page, slot].set(v, mode="drop")

    def copy(
        self,
        pages: tuple[Shaped[Array, "pages ..."], ...],
        source: Int[Array, " n"],
        target: Int[Array, " n"],
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """See `PagedAttention.copy`."""
        return tuple(array.at[target].set(array[source], mode="drop") for array in pages)

    def attend(
        self,
        q: Float[Array, "tokens heads head_size"],
        pages: tuple[Shaped[Array, "pages ..."], ...],
        page_table: Int[Array, "seqs pages_per_seq"],
        query_starts: Int[Array, " seqs_and_end"],
        kv_lens: Int[Array, " seqs"],
        *,
        num_single: int,
    ) -> Float[Array, "tokens heads head_size"]:
        """See `PagedAttention.attend`."""
        del num_single
        keys, values = pages
        num_tokens, _, head_size = q.shape
        owner, position = _owners(query_starts, kv_lens, num_tokens)
        flat = (num_tokens, -1, *keys.shape[2:])
        k, v = keys[page_table[owner]].reshape(flat), values[page_table[owner]].reshape(flat)
        seen = jnp.arange(k.shape[1])[None] <= position[:, None]
        # A slot that is masked for a query may contain anything, and 0 * NaN is NaN.
        v = jnp.where(seen[:, :, None, None], v, 0).astype(jnp.float32)
        grouped = q.reshape(num_tokens, k.shape[2], -1, head_size)
        scores = jnp.einsum("nkgd,ntkd->nkgt", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(head_size)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        exponentials = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, initial=-1e30))
        weights = exponentials / jnp.maximum(jnp.sum(exponentials, axis=-1, keepdims=True), 1)
        return jnp.einsum("nkgt,ntkd->nkgd", weights, v).reshape(q.shape).astype(q.dtype)


def _owners(
    query_starts: Int[Array, " seqs_and_end"], kv_lens: Int[Array, " seqs"], num_tokens: int
) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"]]:
    """Return the sequence of each token, and the token's position in it (-1 for padding)."""
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(tokens[:, None] >= query_starts[None, 1:], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, kv_lens.shape[0] - 1)
    from_end = query_starts[owner + 1] - tokens
    return owner, jnp.where(tokens < query_starts[-1], kv_lens[owner] - from_end, -1)
