"""Tiles of queries against keys and values in pages, as one Pallas kernel (Triton) for GPUs.

Each program of the grid reads the keys of one tile and one key/value head, or of a fixed range of them, once, straight
from their pages, with an online softmax (https://arxiv.org/abs/2205.14135). Ranges are put together in XLA, as in
https://arxiv.org/abs/2311.01282: few long sequences would leave most of a GPU idle otherwise.

JAX deprecates this backend of Pallas from 0.11 on, and has no replacement that older versions know.

Legend: as in `paged_xla`; S range of keys, P page, O slot within a page.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from simpo_pipeline.ops.linear import product
from simpo_pipeline.ops.paged_xla import KEYS_PER_BLOCK, LEAST_TOTAL, MASKED

# Matrix units of GPUs take no fewer rows.
_LEAST_ROWS = 16
# Blocks of keys of a program: fewer make more programs, whose sums are to be put together.
_BLOCKS_PER_RANGE = 512 // KEYS_PER_BLOCK
# Long page tables have longer ranges instead: results of all of them are written, also of those without keys.
_MOST_RANGES = 16
_NUM_WARPS = 4
# Blocks of keys on their way while one is computed with.
_NUM_STAGES = 3
_LOG2_E = math.log2(math.e)


def takes(head_size: int) -> bool:
    """Whether the kernel can read heads of that size."""
    return head_size >= _LEAST_ROWS and head_size & (head_size - 1) == 0


def attend_in_ranges(
    q_NKRD: Float[Array, "N K R D"],
    positions_NR: Int[Array, "N R"],
    page_table: Int[Array, "N pages_per_seq"],
    keys_POKD: Float[Array, "P O K D"],
    values_POKD: Float[Array, "P O K D"],
    *,
    splits: bool,
    interpret: bool = False,
) -> Float[Array, "N K R D"]:
    """Each row attends to the keys of its tile's pages up to and including its position; fp32, scores are not scaled.

    A position of -1 sees nothing, and gives zeros. `splits` lets several programs share the keys of a tile; into which
    ranges depends on the width of the page table alone. `interpret` runs the kernel as XLA operations, anywhere.
    """
    num_tiles, kv_heads, rows, head_size = q_NKRD.shape
    blocks = pl.cdiv(page_table.shape[1] * keys_POKD.shape[1], KEYS_PER_BLOCK)
    blocks_per_range = max(_BLOCKS_PER_RANGE, pl.cdiv(blocks, _MOST_RANGES)) if splits else blocks
    ranges = pl.cdiv(blocks, blocks_per_range)
    kernel = functools.partial(_add_keys, rows=rows, blocks_per_range=blocks_per_range)
    sums = (ranges, num_tiles, kv_heads, rows)
    weighted, total, peak = pl.pallas_call(
        kernel,
        grid=(kv_heads, num_tiles, ranges),
        out_shape=[
            jax.ShapeDtypeStruct((*sums, head_size), jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=_NUM_WARPS, num_stages=_NUM_STAGES),
        interpret=interpret,
        name="paged_attention",
    )(q_NKRD, positions_NR, jnp.max(positions_NR, axis=1) + 1, page_table, keys_POKD, values_POKD)
    scale = jnp.exp2(peak - jnp.max(peak, axis=0, keepdims=True))
    whole = jnp.sum(total * scale, axis=0)
    return jnp.sum(weighted * scale[..., None], axis=0) / jnp.maximum(whole, LEAST_TOTAL)[..., None]


def _add_keys(
    q_ref,
    positions_ref,
    ends_ref,
    table_ref,
    keys_ref,
    values_ref,
    weighted_ref,
    total_ref,
    peak_ref,
    *,
    rows: int,
    blocks_per_range: int,
) -> None:
    """The sums of one tile and one key/value head over one range of keys."""
    head, tile, part = (pl.program_id(axis) for axis in range(3))
    page_size, head_size = keys_ref.shape[1], keys_ref.shape[3]
    num_rows = max(_LEAST_ROWS, pl.next_power_of_2(rows))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    is_row = row < rows
    # Whole indices: the kernel's interpreter knows no masks beside slices.
    row_RD = jnp.broadcast_to(row[:, None], (num_rows, head_size))
    column_RD = jnp.broadcast_to(jnp.arange(head_size, dtype=jnp.int32), (num_rows, head_size))
    q = triton.load(q_ref.at[tile, head, row_RD, column_RD], mask=row_RD < rows, other=0.0)
    positions = triton.load(positions_ref.at[tile, row], mask=is_row, other=-1)
    first = part * blocks_per_range
    end = jnp.minimum(pl.cdiv(ends_ref[tile], KEYS_PER_BLOCK), first + blocks_per_range)

    def add_block(index: Int[Array, ""], sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weighted, total, peak = sums
        key = index * KEYS_PER_BLOCK + jnp.arange(KEYS_PER_BLOCK, dtype=jnp.int32)
        # The last block may reach past the table, and past the sequence's own pages.
        page = table_ref[tile, jnp.minimum(key // page_size, table_ref.shape[1] - 1)]
        page = jnp.clip(page, 0, keys_ref.shape[0] - 1)
        keys, values = (ref[page, key % page_size, head, :] for ref in (keys_ref, values_ref))
        scores = product(q, keys, 1, 1) * _LOG2_E
        sees = key[None] <= positions[:, None]
        new_peak = jnp.maximum(peak, jnp.max(jnp.where(sees, scores, MASKED), axis=1))
        exponentials = jnp.where(sees, jnp.exp2(scores - new_peak[:, None]), 0.0)
        kept = jnp.exp2(peak - new_peak)
        return (
            weighted * kept[:, None] + product(exponentials.astype(values.dtype), values, 1, 0),
            total * kept + jnp.sum(exponentials, axis=1),
            new_peak,
        )

    nothing = (
        jnp.zeros((num_rows, head_size), jnp.float32),
        jnp.zeros(num_rows, jnp.float32),
        jnp.full(num_rows, MASKED, jnp.float32),
    )
    weighted, total, peak = lax.fori_loop(first, end, add_block, nothing)
    triton.store(weighted_ref.at[part, tile, head, row_RD, column_RD], weighted, mask=row_RD < rows)
    triton.store(total_ref.at[part, tile, head, row], total, mask=is_row)
    triton.store(peak_ref.at[part, tile, head, row], peak, mask=is_row)
