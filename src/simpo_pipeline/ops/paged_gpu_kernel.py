"""Attention of query tiles over keys and values in pages, as one Pallas (Triton) kernel for GPUs.

Each program of the grid handles one tile and one key/value head. It reads all their keys, or a fixed range of them,
once and directly from the pages, with an online softmax (https://arxiv.org/abs/2205.14135). XLA combines the ranges,
as in https://arxiv.org/abs/2311.01282. Without ranges, a few long sequences would leave most of a GPU idle.

The starts of the ranges are constants, and ranges are added in order. So neither other sequences nor the width of the
page table change a result. Chunks are not split into ranges: past the first range they may round differently from
single queries.

`jax_default_matmul_precision` sets the precision of float32 matmuls, by default TF32. JAX deprecates Pallas for Triton
from 0.11 on, in favour of Mosaic GPU.

Legend: as in `paged_xla`; S range of keys, P page, O slot within a page.
"""

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from simpo_pipeline.ops.linear import matmul
from simpo_pipeline.ops.paged_xla import KEYS_PER_BLOCK, MASKED, MIN_TOTAL, QueryTiles

# The minimum number of rows of a GPU's matrix units.
_MIN_ROWS = 16
# Keys per range, for the first ranges. Shorter ranges mean more programs, whose sums must be combined.
_FIRST_RANGE = 512
# After this many ranges the length doubles, because sums are written for every range that a page table has room for.
_RANGES_OF_A_LENGTH = 8
# The most rows of a tile whose sums fit in the registers of four warps, and of eight.
_MAX_ROWS_FOR_FOUR_WARPS = 64
_MAX_ROWS = 128
# The largest head, in bytes, for which three blocks of keys and values fit in a GPU's shared memory: one in use and two
# being fetched. For heads twice as large, two blocks fit.
_MAX_HEAD_BYTES_FOR_THREE_STAGES = 256
_LOG2_E = math.log2(math.e)


def takes(rows: int, head_size: int, itemsize: int) -> bool:
    """Return whether the kernel supports tiles of `rows` rows and heads of `head_size` elements of `itemsize` bytes."""
    is_power_of_2 = head_size & (head_size - 1) == 0
    return rows <= _MAX_ROWS and head_size >= _MIN_ROWS and is_power_of_2 and head_size * itemsize <= 512


def attend_in_ranges(
    tiles: QueryTiles,
    keys_POKD: Float[Array, "P O K D"],
    values_POKD: Float[Array, "P O K D"],
    *,
    interpret: bool = False,
) -> Float[Array, "N K R D"]:
    """Implement `AttendTiles` over these pages. If the tiles are single queries, several programs share a tile's keys.

    `interpret` runs the kernel as XLA operations, on any device.
    """
    num_tiles, kv_heads, rows, head_size = tiles.q_NKRD.shape
    positions_NR, page_table, splits = tiles.positions_NR, tiles.page_table, tiles.is_single
    max_keys = page_table.shape[1] * keys_POKD.shape[1]
    ranges = next(count for count in itertools.count(1) if _range_start(count) >= max_keys) if splits else 1
    kernel = functools.partial(_add_keys, rows=rows, splits=splits)
    sums = (ranges, num_tiles, kv_heads, rows)
    weighted, total, peak = pl.pallas_call(
        kernel,
        grid=(kv_heads, num_tiles, ranges),
        out_shape=[
            jax.ShapeDtypeStruct((*sums, head_size), jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
        ],
        compiler_params=triton.CompilerParams(
            num_warps=4 if rows <= _MAX_ROWS_FOR_FOUR_WARPS else 8,
            num_stages=3 if head_size * keys_POKD.dtype.itemsize <= _MAX_HEAD_BYTES_FOR_THREE_STAGES else 2,
        ),
        interpret=interpret,
        name="paged_attention",
    )(tiles.q_NKRD, positions_NR, jnp.max(positions_NR, axis=1) + 1, page_table, keys_POKD, values_POKD)
    scale = jnp.exp2(peak - jnp.max(peak, axis=0, keepdims=True))
    whole = functools.reduce(operator.add, total * scale)
    return functools.reduce(operator.add, weighted * scale[..., None]) / jnp.maximum(whole, MIN_TOTAL)[..., None]


def _range_start(part: int | Int[Array, ""]) -> int | Int[Array, ""]:
    """Return the first key of a range, given the index of the range."""
    doublings, rest = part // _RANGES_OF_A_LENGTH, part % _RANGES_OF_A_LENGTH
    return _FIRST_RANGE * (_RANGES_OF_A_LENGTH * ((1 << doublings) - 1) + (rest << doublings))


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
    splits: bool,
) -> None:
    """Compute the sums of one tile and one key/value head over one range of keys, or over all keys."""
    head, tile, part = (pl.program_id(axis) for axis in range(3))
    page_size, head_size = keys_ref.shape[1], keys_ref.shape[3]
    num_rows = max(_MIN_ROWS, pl.next_power_of_2(rows))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    is_row = row < rows
    # Full index arrays: the Pallas interpreter does not support masks together with slices.
    row_RD = jnp.broadcast_to(row[:, None], (num_rows, head_size))
    column_RD = jnp.broadcast_to(jnp.arange(head_size, dtype=jnp.int32), (num_rows, head_size))
    q = triton.load(q_ref.at[tile, head, row_RD, column_RD], mask=row_RD < rows, other=0.0)
    positions = triton.load(positions_ref.at[tile, row], mask=is_row, other=-1)
    first, end = jnp.int32(0), pl.cdiv(ends_ref[tile], KEYS_PER_BLOCK)
    if splits:
        first = _range_start(part) // KEYS_PER_BLOCK
        end = jnp.minimum(end, _range_start(part + 1) // KEYS_PER_BLOCK)

    def add_block(index: Int[Array, ""], sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        weighted, total, peak = sums
        key = index * KEYS_PER_BLOCK + jnp.arange(KEYS_PER_BLOCK, dtype=jnp.int32)
        # The last block may extend past the page table, and past the sequence's own pages.
        page = table_ref[tile, jnp.minimum(key // page_size, table_ref.shape[1] - 1)]
        page = jnp.clip(page, 0, keys_ref.shape[0] - 1)
        keys, values = (ref[page, key % page_size, head, :] for ref in (keys_ref, values_ref))
        scores = matmul(q, keys, 1, 1) * _LOG2_E
        sees = key[None] <= positions[:, None]
        new_peak = jnp.maximum(peak, jnp.max(jnp.where(sees, scores, MASKED), axis=1))
        exponentials = jnp.where(sees, jnp.exp2(scores - new_peak[:, None]), 0.0)
        kept = jnp.exp2(peak - new_peak)
        return (
            weighted * kept[:, None] + matmul(exponentials.astype(values.dtype), values, 1, 0),
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
