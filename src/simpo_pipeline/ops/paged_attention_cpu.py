"""Paged attention for XLA's CPU backend.

The page layout suits its matmuls, which read both operands of the decode step without a transpose: keys are
[page, kv_head, head_size, slot], values are [page, kv_head, slot, head_size].

Legend: as in `paged_xla`; O slot within a page.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages
from simpo_pipeline.ops.paged_xla import KEYS_PER_BLOCK, attend_in_tiles, copy_pages, in_blocks, storable_values


@dataclasses.dataclass(frozen=True)
class CpuPagedAttention:
    """`PagedAttention` in plain XLA, which also partitions it over devices."""

    name: ClassVar[str] = "cpu"
    # Pages of one whole key block are gathered twice as fast as smaller ones (30 layers, 128 sequences of 100 tokens,
    # SmolLM2-135M in fp32 on 2 cores of a Zen 5: 53 ms per step, vs. 102 ms with pages of 8 tokens).
    default_page_size: ClassVar[int] = KEYS_PER_BLOCK
    keys_per_block: ClassVar[int | None] = KEYS_PER_BLOCK
    kv_heads_axis: ClassVar[int] = 1

    def empty(self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> Pages:
        """Return zeros: keys [pages, kv_heads, head_size, page_size] and values [..., page_size, head_size]."""
        stored = _stored_dtype(dtype)
        keys = jnp.zeros((num_pages, kv_heads, head_size, page_size), stored)
        return keys, jnp.zeros((num_pages, kv_heads, page_size, head_size), stored)

    def write(self, pages: Pages, tokens: NewTokens) -> Pages:
        """See `PagedAttention.write`."""
        keys, values = pages
        keys = keys.at[tokens.page, :, :, tokens.slot].set(_stored(tokens.k), mode="drop")
        stored_values = _stored(storable_values(tokens.v))
        return keys, values.at[tokens.page, :, tokens.slot, :].set(stored_values, mode="drop")

    def copy(self, pages: Pages, source: Int[Array, " n"], target: Int[Array, " n"]) -> Pages:
        """See `PagedAttention.copy`."""
        return copy_pages(pages, source, target)

    def attend(
        self, q: Float[Array, "tokens heads head_size"], pages: Pages, sequences: PagedSequences
    ) -> Float[Array, "tokens heads head_size"]:
        """See `PagedAttention.attend`."""
        keys, values = pages
        kv_heads, head_size, page_size = keys.shape[1:]

        def read_block(indices: Int[Array, "N W"]) -> tuple[Float[Array, "N K D T"], Float[Array, "N K T D"]]:
            k_NWKDO = _loaded(keys.at[indices].get(mode="clip"))
            v_NWKOD = _loaded(values.at[indices].get(mode="clip"))
            num_tiles = indices.shape[0]
            k_NKDT = k_NWKDO.transpose(0, 2, 3, 1, 4).reshape(num_tiles, kv_heads, head_size, -1)
            return k_NKDT, v_NWKOD.transpose(0, 2, 1, 3, 4).reshape(num_tiles, kv_heads, -1, head_size)

        return attend_in_tiles(q, in_blocks(read_block, page_size), sequences, kv_heads)


def _stored_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the dtype in which pages store values of `dtype`: uint16 bits for bfloat16, otherwise `dtype` itself.

    To gather from or scatter into a bfloat16 array, XLA's CPU backend converts the whole array to float32. It updates
    integer arrays in place.
    """
    return np.dtype(np.uint16) if jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def _stored(values: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    return lax.bitcast_convert_type(values, _stored_dtype(values.dtype))


def _loaded(stored: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    return lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored
