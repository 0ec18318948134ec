"""Paged attention code that the backends share: splitting queries into tiles, and plain XLA attention over tiles.

The plain XLA attention loops over blocks of keys, with an online softmax. A `ReadBlock` hides the layout of a page, so
all backends share the algorithm. The work depends on the longest sequence present, not on the width of the page table:
the loop over key blocks stops after that sequence. A block that is masked for a query leaves that query's result
bitwise unchanged, so results do not depend on the lengths of other sequences.

Legend: K key/value head, G query head within its group, D head_size, N tile of queries, Q query within its tile,
R row = (query, group) within a tile, W page within a key block, T key within a key block.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from simpo_pipeline.ops.paged_batch import PagedSequences, Pages

# Keys read at once. Shorter blocks waste less work past a sequence's end; longer ones mean fewer and larger matmuls.
KEYS_PER_BLOCK = 64
# Queries of one sequence that share one read of its keys, if the sequence has several queries (prefill).
QUERIES_PER_TILE = 16
# Value of a masked score: far below any real score, and finite so that a fully masked block gives no NaN.
MASKED = -1e30
# Lower bound of a denominator: below any non-empty sum of exponentials, so it only takes effect if the sum is empty.
MIN_TOTAL = 1e-30
# Largest value that is stored. Masked slots have weight 0, and a sum over many values of this size times 0 is still 0.
_LARGEST_VALUE = 1e30

# Pages [N W] -> their keys [N K D T] and values [N K T D]. In slots without a token, keys may be anything and values
# are finite. A page index past the last page reads an arbitrary page.
ReadBlock = Callable[[Int[Array, "N W"]], tuple[Float[Array, "N K D T"], Float[Array, "N K T D"]]]


class QueryTiles(eqx.Module):
    """Tiles of queries, and the pages of each tile's sequence."""

    q_NKRD: Float[Array, "N K R D"]
    positions_NR: Int[Array, "N R"]
    """Position of each row's query in its sequence; -1 for padding."""
    page_table: Int[Array, "N pages_per_seq"]
    is_single: bool = eqx.field(static=True)
    """Whether each tile is one query of a separate sequence."""


# Attends from each row to the keys of its tile's pages, up to and including its position. The result is fp32, and
# scores are not scaled. Padding gives zeros.
AttendTiles = Callable[[QueryTiles], Float[Array, "N K R D"]]


def copy_pages(pages: Pages, source: Int[Array, " n"], target: Int[Array, " n"]) -> Pages:
    """Implement `PagedAttention.copy`."""
    return tuple(array.at[target].set(array.at[source].get(mode="clip"), mode="drop") for array in pages)


def storable_values(v: Float[Array, "tokens kv_heads head_size"]) -> Float[Array, "tokens kv_heads head_size"]:
    """Return the values, with 0 for values that are not finite or too large for a weight of 0 to cancel in a sum.

    Doing this once when values are written saves each step a pass over all values read (49 -> 44 ms per decode step of
    128 sequences of 100 tokens, SmolLM2-135M on 2 cores of a Zen 5).
    """
    return jnp.where(jnp.abs(v.astype(jnp.float32)) <= _LARGEST_VALUE, v, jnp.zeros((), v.dtype))


def attend_in_tiles(
    q: Float[Array, "tokens heads head_size"], attend: AttendTiles, sequences: PagedSequences, kv_heads: int
) -> Float[Array, "tokens heads head_size"]:
    """Implement `PagedAttention.attend` by splitting the queries into tiles."""
    num_single = sequences.num_single
    parts = []
    if num_single:
        single = sequences.single()
        tiling = _tiling_of_single_queries(single.kv_lens, q.shape[1] // kv_heads)
        parts.append(_attend(q[:num_single], tiling, attend, single.page_table, kv_heads, is_single=True))
    if num_single < sequences.kv_lens.shape[0]:
        chunks = sequences.chunks()
        tiling = _tiling(chunks.query_starts, chunks.kv_lens, q.shape[0] - num_single)
        parts.append(_attend(q[num_single:], tiling, attend, chunks.page_table, kv_heads, is_single=False))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def in_blocks(read_block: ReadBlock, page_size: int) -> AttendTiles:
    """Return `AttendTiles` in plain XLA, over pages of `page_size` tokens that `read_block` reads."""

    def attend(tiles: QueryTiles) -> Float[Array, "N K R D"]:
        q_NKRD, positions_NR = tiles.q_NKRD, tiles.positions_NR
        blocks = _page_blocks(tiles.page_table, page_size)
        keys_per_block = blocks.shape[2] * page_size

        def add_block(index: Int[Array, ""], sums: _Sums) -> _Sums:
            k_NKDT, v_NKTD = read_block(lax.dynamic_index_in_dim(blocks, index, keepdims=False))
            return _merged(sums, _block_sums(q_NKRD, k_NKDT, v_NKTD, positions_NR - index * keys_per_block))

        num_blocks = (jnp.max(positions_NR) + keys_per_block) // keys_per_block
        sums = lax.fori_loop(0, num_blocks, add_block, _no_sums(q_NKRD))
        return sums.weighted / jnp.maximum(sums.total, MIN_TOTAL)[..., None]

    return attend


class _Tiling(NamedTuple):
    """Assignment of queries to tiles of one size. Each tile belongs to one sequence."""

    tokens: Int[Array, "tiles tile_size"]  # index of each query in q; arbitrary for padding
    positions: Int[Array, "tiles tile_size"]  # position of each query in its sequence; -1 for padding
    seqs: Int[Array, " tiles"]  # the sequence of each tile; arbitrary for a tile of padding
    tile_indices: Int[Array, " tokens"]  # where each token is: tile * tile_size + index within the tile
    is_query: Bool[Array, " tokens"]  # whether the token is a query of a sequence, not padding


class _Sums(NamedTuple):
    """Running state of a softmax-weighted sum over the keys processed so far, fp32."""

    peak: Float[Array, "N K R"]  # largest score
    total: Float[Array, "N K R"]  # sum of exp(score - peak)
    weighted: Float[Array, "N K R D"]  # sum of exp(score - peak) * value


def _tiling_of_single_queries(kv_lens: Int[Array, " seqs"], group: int) -> _Tiling:
    """Return one tile per sequence, with one query and at least two rows: matmuls with one row round differently."""
    seqs = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    tile_size = max(1, 2 // group)
    padding = jnp.full((kv_lens.shape[0], tile_size - 1), -1, jnp.int32)
    return _Tiling(
        tokens=jnp.repeat(seqs[:, None], tile_size, axis=1),
        positions=jnp.concatenate([kv_lens[:, None] - 1, padding], axis=1),
        seqs=seqs,
        tile_indices=seqs * tile_size,
        is_query=kv_lens > 0,
    )


def _tiling(query_starts: Int[Array, " seqs_and_end"], kv_lens: Int[Array, " seqs"], num_tokens: int) -> _Tiling:
    size, num_seqs = QUERIES_PER_TILE, kv_lens.shape[0]
    num_queries = query_starts[1:] - query_starts[:-1]
    ends = jnp.cumsum((num_queries + size - 1) // size, dtype=jnp.int32)
    starts = ends - (num_queries + size - 1) // size
    # Each sequence fills all of its tiles except possibly the last.
    tiles = jnp.arange(num_tokens // size + num_seqs, dtype=jnp.int32)
    seqs = jnp.minimum(jnp.sum(tiles[:, None] >= ends[None], axis=1, dtype=jnp.int32), num_seqs - 1)
    query = (tiles - starts[seqs])[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    exists = query < num_queries[seqs][:, None]
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(tokens[:, None] >= query_starts[None, 1:], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, num_seqs - 1)
    return _Tiling(
        tokens=jnp.where(exists, query_starts[seqs][:, None] + query, 0),
        positions=jnp.where(exists, (kv_lens - num_queries)[seqs][:, None] + query, -1),
        seqs=seqs,
        tile_indices=starts[owner] * size + tokens - query_starts[owner],
        is_query=tokens < query_starts[-1],
    )


def _attend(
    q: Float[Array, "tokens heads head_size"],
    tiling: _Tiling,
    attend: AttendTiles,
    page_table: Int[Array, "seqs pages_per_seq"],
    kv_heads: int,
    *,
    is_single: bool,
) -> Float[Array, "tokens heads head_size"]:
    group = q.shape[1] // kv_heads
    q_NKRD = _by_tile(q * (1 / math.sqrt(q.shape[2])), tiling, kv_heads)
    positions_NR = jnp.repeat(tiling.positions, group, axis=1)
    out_NKRD = attend(QueryTiles(q_NKRD, positions_NR, page_table[tiling.seqs], is_single))
    return _by_token(out_NKRD, tiling, group).astype(q.dtype)


def _by_tile(
    q: Float[Array, "tokens heads head_size"], tiling: _Tiling, kv_heads: int
) -> Float[Array, "N K R head_size"]:
    num_tiles, tile_size = tiling.tokens.shape
    q_NQKGD = q[tiling.tokens].reshape(num_tiles, tile_size, kv_heads, -1, q.shape[2])
    return jnp.swapaxes(q_NQKGD, 1, 2).reshape(num_tiles, kv_heads, -1, q.shape[2])


def _by_token(x_NKRD: Float[Array, "N K R D"], tiling: _Tiling, group: int) -> Float[Array, "tokens heads D"]:
    """Undo `_by_tile`; padding tokens give zeros."""
    num_tiles, kv_heads, _, head_size = x_NKRD.shape
    x_NQKGD = jnp.swapaxes(x_NKRD.reshape(num_tiles, kv_heads, -1, group, head_size), 1, 2)
    x = x_NQKGD.reshape(-1, kv_heads * group, head_size)[tiling.tile_indices]
    return jnp.where(tiling.is_query[:, None, None], x, 0)


def _page_blocks(
    pages: Int[Array, "tiles pages_per_seq"], page_size: int
) -> Int[Array, "blocks tiles pages_per_block"]:
    pages_per_block = max(1, KEYS_PER_BLOCK // page_size)
    missing = -pages.shape[1] % pages_per_block
    padded = jnp.pad(pages, ((0, 0), (0, missing)))
    return jnp.swapaxes(padded.reshape(pages.shape[0], -1, pages_per_block), 0, 1)


def _no_sums(q_NKRD: Float[Array, "N K R D"]) -> _Sums:
    shape = q_NKRD.shape
    return _Sums(
        peak=jnp.full(shape[:3], MASKED, jnp.float32),
        total=jnp.zeros(shape[:3], jnp.float32),
        weighted=jnp.zeros(shape, jnp.float32),
    )


def _block_sums(
    q_NKRD: Float[Array, "N K R D"],
    k_NKDT: Float[Array, "N K D T"],
    v_NKTD: Float[Array, "N K T D"],
    positions_NR: Int[Array, "N R"],
) -> _Sums:
    """Return the sums over one block of keys. Positions are relative to the block's first key."""
    scores_NKRT = jnp.einsum("NKRD,NKDT->NKRT", q_NKRD, k_NKDT, preferred_element_type=jnp.float32)
    key = jnp.arange(k_NKDT.shape[3], dtype=jnp.int32)
    seen = (key[None, None] <= positions_NR[:, :, None])[:, None]
    scores_NKRT = jnp.where(seen, scores_NKRT, MASKED)
    peak = jnp.max(scores_NKRT, axis=-1)
    exponentials = jnp.exp(scores_NKRT - peak[..., None])
    weighted = jnp.einsum(
        "NKRT,NKTD->NKRD", exponentials.astype(v_NKTD.dtype), v_NKTD, preferred_element_type=jnp.float32
    )
    # The `where` also stops XLA from fusing the sum with the arithmetic of `_merged`, which rounds differently in large
    # batches.
    total = jnp.where(peak > MASKED, jnp.sum(exponentials, axis=-1), 0)
    return _Sums(peak, total, weighted)


def _merged(a: _Sums, b: _Sums) -> _Sums:
    peak = jnp.maximum(a.peak, b.peak)
    scale_a, scale_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return _Sums(
        peak=peak,
        total=a.total * scale_a + b.total * scale_b,
        weighted=a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None],
    )
