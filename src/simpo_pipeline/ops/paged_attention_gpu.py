"""Paged attention for GPUs: plain XLA over pages of [slot, kv_head, head_size].

Its numerics are tested on CPU. It was never run on a GPU, so its speed there is unknown: the layout, in which a
token's keys are one stretch of memory, and the block of keys are choices, not measurements.

Legend: as in `paged_xla`; O slot within a page.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from simpo_pipeline.ops.paged_xla import KEYS_PER_BLOCK, attend_in_tiles, copy_pages, storable_values


@dataclasses.dataclass(frozen=True)
class GpuPagedAttention:
    """`PagedAttention` in plain XLA, which also splits it over devices."""

    name: ClassVar[str] = "gpu"
    # A whole key block, so that a block is one gather of one page a sequence.
    default_page_size: ClassVar[int] = KEYS_PER_BLOCK
    keys_per_block: ClassVar[int | None] = KEYS_PER_BLOCK
    kv_heads_axis: ClassVar[int] = 2

    def empty(
        self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """Two arrays of zeros of `dtype`, keys and values: [pages, page_size, kv_heads, head_size]."""
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
        keys = keys.at[page, slot].set(k, mode="drop")
        return keys, values.at[page, slot].set(storable_values(v), mode="drop")

    def copy(
        self,
        pages: tuple[Shaped[Array, "pages ..."], ...],
        source: Int[Array, " n"],
        target: Int[Array, " n"],
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """See `PagedAttention.copy`."""
        return copy_pages(pages, source, target)

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
        keys, values = pages
        page_size, kv_heads, head_size = keys.shape[1:]

        def read_block(indices: Int[Array, "N W"]) -> tuple[Float[Array, "N K D T"], Float[Array, "N K T D"]]:
            block = (indices.shape[0], -1, kv_heads, head_size)
            k_NTKD = keys.at[indices].get(mode="clip").reshape(block)
            v_NTKD = values.at[indices].get(mode="clip").reshape(block)
            return k_NTKD.transpose(0, 2, 3, 1), v_NTKD.transpose(0, 2, 1, 3)

        sizes = {"num_single": num_single, "kv_heads": kv_heads, "page_size": page_size}
        return attend_in_tiles(q, read_block, page_table, query_starts, kv_lens, **sizes)
