"""Attention of a ragged batch of queries over keys and values that lie in pages.

The queries of several sequences are laid end to end in one array; decoding is the case of one query per sequence.
`paged_attention_reference` is the definition and the oracle of the tests; `paged_attention` is what the engine calls
on CPU. Which pages belong to whom is the caller's business: nothing here allocates, and layers are unknown here (the
engine folds them into the page index).

Pages are laid out for XLA's CPU matrix products, which take both operands of the decode step as they lie:
keys as [page, kv_head, head_size, slot], values as [page, kv_head, slot, head_size]. Their dtype is
`stored_dtype` of the numbers' dtype.

Legend: K key/value head, G query head within its group, D head_size, O slot within a page, N tile of queries,
Q query within its tile, R row = (query, group) within a tile, W page within a key block, T key within a key block.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

# Queries of one sequence that share one read of its keys, when a sequence has several (prefill).
_QUERIES_PER_TILE = 16
# Keys read at once: shorter blocks follow the true lengths closer, longer ones make fewer and larger products.
_KEYS_PER_BLOCK = 64
# What a masked score becomes: far below any real one, and finite so that a fully masked block gives no NaN.
_MASKED = -1e30
# Below any sum of exponentials that has a term, so that dividing by it matters only where there is none.
_LEAST_TOTAL = 1e-30


def stored_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype of pages that hold numbers of `dtype`: bfloat16 lies in them as its bits, all else as it is.

    XLA's CPU backend converts an array of bfloat16 to float32, the whole of it, to gather from it or to scatter into
    it; integers it leaves in place.
    """
    return np.dtype(np.uint16) if jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def write_pages(
    keys: Shaped[Array, "pages kv_heads head_size page_size"],
    values: Shaped[Array, "pages kv_heads page_size head_size"],
    k: Float[Array, "tokens kv_heads head_size"],
    v: Float[Array, "tokens kv_heads head_size"],
    pages: Int[Array, " tokens"],
    slots: Int[Array, " tokens"],
) -> tuple[
    Shaped[Array, "pages kv_heads head_size page_size"],
    Shaped[Array, "pages kv_heads page_size head_size"],
]:
    """Puts token t's key and value into slot `slots[t]` of page `pages[t]`; a page past the last one drops them."""
    keys = keys.at[pages, :, :, slots].set(_stored(k), mode="drop")
    values = values.at[pages, :, slots, :].set(_stored(v), mode="drop")
    return keys, values


def paged_attention_reference(
    q: Float[Array, "tokens heads head_size"],
    keys: Shaped[Array, "pages kv_heads head_size page_size"],
    values: Shaped[Array, "pages kv_heads page_size head_size"],
    page_table: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs_and_end"],
    kv_lens: Int[Array, " seqs"],
    *,
    max_queries_per_seq: int,
) -> Float[Array, "tokens heads head_size"]:
    """Each query attends to the tokens of its sequence up to and including itself.

    Sequence s owns `q[query_starts[s]:query_starts[s + 1]]`, at most `max_queries_per_seq` of them: its last tokens,
    whose keys and values are in its pages already. Its token at position p lies in page
    `page_table[s, p // page_size]`, slot `p % page_size`, for p < kv_lens[s]; the rest of its row may hold any page.
    Query head h reads key/value head `h // (heads // kv_heads)`. Scores and softmax are fp32; the result has q's
    dtype. Queries of no sequence, and those of a sequence without keys, give zeros.
    """
    del max_queries_per_seq
    num_tokens, head_size = q.shape[0], q.shape[2]
    num_keys = page_table.shape[1] * keys.shape[3]
    owner, position = _owners(query_starts, kv_lens, num_tokens)
    pages = page_table[owner]
    seen = jnp.arange(num_keys)[None] <= position[:, None]
    k = jnp.moveaxis(_numbers(keys[pages]), 4, 2).reshape(num_tokens, num_keys, -1, head_size)
    v = jnp.moveaxis(_numbers(values[pages]), 3, 2).reshape(num_tokens, num_keys, -1, head_size)
    # A slot that a query does not see may hold anything, and 0 * NaN is NaN.
    v = jnp.where(seen[:, :, None, None], v, 0).astype(jnp.float32)
    grouped = q.reshape(num_tokens, k.shape[2], -1, head_size)
    scores = jnp.einsum("nkgd,ntkd->nkgt", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(head_size)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    exponentials = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, initial=_MASKED))
    weights = exponentials / jnp.maximum(jnp.sum(exponentials, axis=-1, keepdims=True), 1)
    return jnp.einsum("nkgt,ntkd->nkgd", weights, v).reshape(q.shape).astype(q.dtype)


def paged_attention(
    q: Float[Array, "tokens heads head_size"],
    keys: Shaped[Array, "pages kv_heads head_size page_size"],
    values: Shaped[Array, "pages kv_heads page_size head_size"],
    page_table: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs_and_end"],
    kv_lens: Int[Array, " seqs"],
    *,
    max_queries_per_seq: int,
) -> Float[Array, "tokens heads head_size"]:
    """The same function of the same arguments as `paged_attention_reference`, arranged for XLA's CPU backend.

    Work follows the longest sequence present, not the width of the page table: key blocks are read in a loop that
    ends with it. A block that a query does not see leaves that query's result untouched to the last bit, so results
    do not depend on the other sequences' lengths. With `max_queries_per_seq` = 1 query s must be sequence s's.
    """
    kv_heads, page_size = keys.shape[1], keys.shape[3]
    group = q.shape[1] // kv_heads
    tiles = (
        _tiles_of_single_queries(kv_lens, group)
        if max_queries_per_seq == 1
        else _tiles(query_starts, kv_lens, q.shape[0], min(_QUERIES_PER_TILE, max_queries_per_seq))
    )
    q_NKRD = _by_tile(q * (1 / math.sqrt(q.shape[2])), tiles, kv_heads)
    positions_NR = jnp.repeat(tiles.positions, group, axis=1)
    blocks = _key_blocks(page_table[tiles.seqs], page_size)
    keys_per_block = blocks.shape[2] * page_size

    def add_block(index: Int[Array, ""], sums: _Sums) -> _Sums:
        pages = lax.dynamic_index_in_dim(blocks, index, keepdims=False)
        start = index * keys_per_block
        return _merged(sums, _block_sums(q_NKRD, keys, values, pages, positions_NR - start, tiles.lens - start))

    num_blocks = (jnp.max(tiles.lens) + keys_per_block - 1) // keys_per_block
    sums = lax.fori_loop(0, num_blocks, add_block, _no_sums(q_NKRD))
    out_NKRD = sums.weighted / jnp.maximum(sums.total, _LEAST_TOTAL)[..., None]
    return _by_token(out_NKRD, tiles, group).astype(q.dtype)


def _stored(numbers: Float[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    return lax.bitcast_convert_type(numbers, stored_dtype(numbers.dtype))


def _numbers(stored: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    return lax.bitcast_convert_type(stored, jnp.bfloat16) if stored.dtype == jnp.uint16 else stored


class _Tiles(NamedTuple):
    """Queries cut into tiles of one size, each of one sequence."""

    tokens: Int[Array, "tiles tile_size"]  # index of each query in q; any, where there is no query
    positions: Int[Array, "tiles tile_size"]  # position of each query in its sequence; -1 where there is no query
    seqs: Int[Array, " tiles"]  # whose queries they are; any, where there are none
    lens: Int[Array, " tiles"]  # keys of that sequence; 0 for a tile without queries
    places: Int[Array, " tokens"]  # where each token went: tile * tile_size + place within the tile


class _Sums(NamedTuple):
    """A softmax-weighted sum in the making, over the keys seen so far, fp32."""

    peak: Float[Array, "N K R"]  # largest score
    total: Float[Array, "N K R"]  # sum of exp(score - peak)
    weighted: Float[Array, "N K R D"]  # sum of exp(score - peak) * value


def _owners(
    query_starts: Int[Array, " seqs_and_end"], kv_lens: Int[Array, " seqs"], num_tokens: int
) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"]]:
    """Of each token: its sequence, and its position in it (-1 for a token of no sequence, or without keys)."""
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    owner = jnp.sum(tokens[:, None] >= query_starts[None, 1:], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, kv_lens.shape[0] - 1)
    from_end = query_starts[owner + 1] - tokens
    position = jnp.where((tokens < query_starts[-1]) & (tokens >= query_starts[0]), kv_lens[owner] - from_end, -1)
    return owner, position


def _tiles_of_single_queries(kv_lens: Int[Array, " seqs"], group: int) -> _Tiles:
    """One tile a sequence, of one query, or of two rows at least: products with one row are rounded otherwise."""
    seqs = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    tile_size = max(1, 2 // group)
    nobody = jnp.full((kv_lens.shape[0], tile_size - 1), -1, jnp.int32)
    return _Tiles(
        tokens=jnp.repeat(seqs[:, None], tile_size, axis=1),
        positions=jnp.concatenate([kv_lens[:, None] - 1, nobody], axis=1),
        seqs=seqs,
        lens=kv_lens,
        places=seqs * tile_size,
    )


def _tiles(
    query_starts: Int[Array, " seqs_and_end"], kv_lens: Int[Array, " seqs"], num_tokens: int, tile_size: int
) -> _Tiles:
    num_seqs = kv_lens.shape[0]
    num_queries = query_starts[1:] - query_starts[:-1]
    ends = jnp.cumsum((num_queries + tile_size - 1) // tile_size, dtype=jnp.int32)
    starts = ends - (num_queries + tile_size - 1) // tile_size
    # Each sequence fills its tiles but the last.
    tiles = jnp.arange(num_tokens // tile_size + num_seqs, dtype=jnp.int32)
    seqs = jnp.minimum(jnp.sum(tiles[:, None] >= ends[None], axis=1, dtype=jnp.int32), num_seqs - 1)
    query = (tiles - starts[seqs])[:, None] * tile_size + jnp.arange(tile_size, dtype=jnp.int32)[None]
    exists = query < num_queries[seqs][:, None]
    owner, _ = _owners(query_starts, kv_lens, num_tokens)
    return _Tiles(
        tokens=jnp.where(exists, query_starts[seqs][:, None] + query, 0),
        positions=jnp.where(exists, (kv_lens - num_queries)[seqs][:, None] + query, -1),
        seqs=seqs,
        lens=jnp.where(exists[:, 0], kv_lens[seqs], 0),
        places=starts[owner] * tile_size + jnp.arange(num_tokens, dtype=jnp.int32) - query_starts[owner],
    )


def _by_tile(
    q: Float[Array, "tokens heads head_size"], tiles: _Tiles, kv_heads: int
) -> Float[Array, "N K R head_size"]:
    num_tiles, tile_size = tiles.tokens.shape
    q_NQKGD = q[tiles.tokens].reshape(num_tiles, tile_size, kv_heads, -1, q.shape[2])
    return jnp.swapaxes(q_NQKGD, 1, 2).reshape(num_tiles, kv_heads, -1, q.shape[2])


def _by_token(x_NKRD: Float[Array, "N K R D"], tiles: _Tiles, group: int) -> Float[Array, "tokens heads D"]:
    """Undoes `_by_tile`; zeros for tokens that are no query of any sequence."""
    num_tiles, kv_heads, _, head_size = x_NKRD.shape
    x_NQKGD = jnp.swapaxes(x_NKRD.reshape(num_tiles, kv_heads, -1, group, head_size), 1, 2)
    x = x_NQKGD.reshape(-1, kv_heads * group, head_size)[tiles.places]
    is_query = tiles.positions.reshape(-1)[tiles.places] >= 0
    return jnp.where(is_query[:, None, None], x, 0)


def _key_blocks(pages: Int[Array, "tiles pages_per_seq"], page_size: int) -> Int[Array, "blocks tiles pages_per_block"]:
    pages_per_block = max(1, _KEYS_PER_BLOCK // page_size)
    missing = -pages.shape[1] % pages_per_block
    padded = jnp.pad(pages, ((0, 0), (0, missing)))
    return jnp.swapaxes(padded.reshape(pages.shape[0], -1, pages_per_block), 0, 1)


def _no_sums(q_NKRD: Float[Array, "N K R D"]) -> _Sums:
    shape = q_NKRD.shape
    return _Sums(
        peak=jnp.full(shape[:3], _MASKED, jnp.float32),
        total=jnp.zeros(shape[:3], jnp.float32),
        weighted=jnp.zeros(shape, jnp.float32),
    )


def _block_sums(
    q_NKRD: Float[Array, "N K R D"],
    keys: Shaped[Array, "pages K D O"],
    values: Shaped[Array, "pages K O D"],
    pages: Int[Array, "N W"],
    positions_NR: Int[Array, "N R"],
    lens: Int[Array, " N"],
) -> _Sums:
    """The sums over one block of keys; positions and lens count from the block's first key."""
    num_tiles, kv_heads, _, head_size = q_NKRD.shape
    k_NWKDO = _numbers(keys.at[pages].get(mode="clip"))
    v_NWKOD = _numbers(values.at[pages].get(mode="clip"))
    k_NKDT = k_NWKDO.transpose(0, 2, 3, 1, 4).reshape(num_tiles, kv_heads, head_size, -1)
    v_NKTD = v_NWKOD.transpose(0, 2, 1, 3, 4).reshape(num_tiles, kv_heads, -1, head_size)
    key = jnp.arange(k_NKDT.shape[3], dtype=jnp.int32)
    # Slots that hold no token of this sequence may hold anything, and 0 * NaN is NaN.
    held = (key[None] < lens[:, None])[:, None, :, None]
    v_NKTD = jnp.where(held, v_NKTD, jnp.zeros((), v_NKTD.dtype))
    scores_NKRT = jnp.einsum("NKRD,NKDT->NKRT", q_NKRD, k_NKDT, preferred_element_type=jnp.float32)
    seen = (key[None, None] <= positions_NR[:, :, None])[:, None]
    scores_NKRT = jnp.where(seen, scores_NKRT, _MASKED)
    peak = jnp.max(scores_NKRT, axis=-1)
    exponentials = jnp.exp(scores_NKRT - peak[..., None])
    weighted = jnp.einsum(
        "NKRT,NKTD->NKRD", exponentials.astype(v_NKTD.dtype), v_NKTD, preferred_element_type=jnp.float32
    )
    # Also keeps the sum out of the arithmetic of `_merged`: fused with it, XLA rounds otherwise in large batches.
    total = jnp.where(peak > _MASKED, jnp.sum(exponentials, axis=-1), 0)
    return _Sums(peak, total, weighted)


def _merged(a: _Sums, b: _Sums) -> _Sums:
    peak = jnp.maximum(a.peak, b.peak)
    scale_a, scale_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return _Sums(
        peak=peak,
        total=a.total * scale_a + b.total * scale_b,
        weighted=a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None],
    )
