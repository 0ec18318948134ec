"""Paged attention for TPUs: JAX's ragged paged attention kernel, run by each device on its own heads.

The page layout is the kernel's: one array [page, slot, 2 * kv_heads, head_size]. Each head's key is followed by its
value, so sharding the third axis gives whole heads.

The kernel supports only certain numbers of heads. For others, plain XLA reads the same pages, more slowly. The shapes
decide which of the two runs.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages
from simpo_pipeline.ops.paged_tpu_blocks import VMEM_LIMIT_BYTES, KernelShape, blocks_for
from simpo_pipeline.ops.paged_xla import attend_in_tiles, in_blocks, storable_values

# Length of the kernel's vectors. HBM pads shorter ones to this length anyway, so padding a head of 64 costs no memory.
_LANES = 128
# The kernel computes every sequence for all queries of a block: small blocks suit single queries, large blocks chunks.
_SINGLE_QUERIES_PER_BLOCK = 8
_CHUNK_QUERIES_PER_BLOCK = 32

_KVPages = Float[Array, "pages page_size two_kv_heads lanes"]


@dataclasses.dataclass(frozen=True)
class TpuPagedAttention:
    """`PagedAttention` with key/value heads sharded over axis `axis` of `mesh`, if its size divides their number."""

    mesh: Mesh
    axis: str
    name: ClassVar[str] = "tpu"
    # The kernel copies page by page and keeps the page table in scalar memory. Large pages mean fewer, longer copies
    # and a shorter table.
    default_page_size: ClassVar[int] = 128
    keys_per_block: ClassVar[int | None] = None
    kv_heads_axis: ClassVar[int] = 2

    def empty(self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> Pages:
        """Return one array of zeros of `dtype`: [pages, page_size, 2 * kv_heads, head_size rounded up to 128]."""
        return (jnp.zeros((num_pages, page_size, 2 * kv_heads, head_size + _lane_padding(head_size)), dtype),)

    def write(self, pages: Pages, tokens: NewTokens) -> Pages:
        """See `PagedAttention.write`."""
        (kv_pages,) = pages
        num_tokens, kv_heads, head_size = tokens.k.shape
        kv = jnp.stack([tokens.k, storable_values(tokens.v)], axis=2).reshape(num_tokens, 2 * kv_heads, head_size)
        return (kv_pages.at[tokens.page, tokens.slot].set(_pad_lanes(kv), mode="drop"),)

    def copy(self, pages: Pages, source: Int[Array, " n"], target: Int[Array, " n"]) -> Pages:
        """See `PagedAttention.copy`."""
        (kv_pages,) = pages
        return (_copy_one_by_one(kv_pages, source, target),)

    def attend(
        self, q: Float[Array, "tokens heads head_size"], pages: Pages, sequences: PagedSequences
    ) -> Float[Array, "tokens heads head_size"]:
        """See `PagedAttention.attend`."""
        (kv_pages,) = pages
        splits = kv_pages.shape[2] // 2 % self.mesh.shape[self.axis] == 0
        axis = self.axis if splits else None
        heads, kv_heads = PartitionSpec(None, axis), PartitionSpec(None, None, axis)
        return jax.shard_map(
            _attend_on_one_device,
            mesh=self.mesh,
            in_specs=(heads, kv_heads, PartitionSpec()),
            out_specs=heads,
            # The kernel does not declare over which mesh axes its result varies.
            check_vma=False,
        )(q, kv_pages, sequences)


def _copy_one_by_one(kv_pages: _KVPages, source: Int[Array, " n"], target: Int[Array, " n"]) -> _KVPages:
    """Copy pages with one slice update each, which keeps their layout.

    A scatter of whole pages needs another layout, and XLA would convert the whole cache to it and back. For a cache of
    4.6 GB on one v5p chip that is an expected 23 ms, and as much memory again.
    """
    last = kv_pages.shape[0] - 1
    read = [lax.dynamic_slice_in_dim(kv_pages, jnp.clip(page, 0, last), 1) for page in source]
    # Otherwise XLA might delay a read until after its page is overwritten, and copy all pages to allow that.
    kv_pages, read = lax.optimization_barrier((kv_pages, read))
    for page, copied in zip(target, read, strict=True):
        at = jnp.clip(page, 0, last)
        kept = lax.dynamic_slice_in_dim(kv_pages, at, 1)
        kv_pages = lax.dynamic_update_slice_in_dim(kv_pages, jnp.where(page <= last, copied, kept), at, 0)
    return kv_pages


def _attend_on_one_device(
    q: Float[Array, "tokens heads head_size"], kv_pages: _KVPages, sequences: PagedSequences
) -> Float[Array, "tokens heads head_size"]:
    if not _kernel_tiles(kv_pages.shape[2], kv_pages.dtype.itemsize):
        return _attend_without_kernel(q, kv_pages, sequences)
    # The kernel dereferences every entry that it reads, and it reads at least the first of each row.
    page_table = jnp.clip(sequences.page_table, 0, kv_pages.shape[0] - 1)
    sequences = dataclasses.replace(sequences, page_table=page_table)
    num_single = sequences.num_single
    parts = []
    if num_single:
        # Each sequence has a query, so the kernel waits for the blocks of all of them.
        all_of_them = jnp.full(1, num_single, jnp.int32)
        parts.append(_kernel(q[:num_single], kv_pages, sequences.single(), all_of_them, _SINGLE_QUERIES_PER_BLOCK))
    if num_single < sequences.kv_lens.shape[0]:
        parts.append(_attend_chunks(q[num_single:], kv_pages, sequences.chunks()))
    return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _attend_chunks(
    q: Float[Array, "tokens heads head_size"], kv_pages: _KVPages, sequences: PagedSequences
) -> Float[Array, "tokens heads head_size"]:
    query_starts = sequences.query_starts

    def attend() -> Float[Array, "tokens heads head_size"]:
        # The kernel prefetches a block for the next sequence. Every sequence that it counts must wait for its block, so
        # it must count none without keys and none after the last query.
        has_queries = query_starts[1:] > query_starts[:-1]
        rows = jnp.arange(sequences.kv_lens.shape[0], dtype=jnp.int32)
        num_seqs = jnp.max(jnp.where(has_queries, rows + 1, 1), keepdims=True)
        out = _kernel(q, kv_pages, sequences, num_seqs, _CHUNK_QUERIES_PER_BLOCK)
        # The kernel leaves arbitrary values where there is no query.
        is_query = jnp.arange(q.shape[0], dtype=jnp.int32) < query_starts[-1]
        return jnp.where(is_query[:, None, None], out, 0)

    # Without any query the kernel would not wait for the first page that it fetches.
    with jax.named_scope("chunks"):
        return lax.cond(query_starts[-1] > 0, attend, lambda: jnp.zeros_like(q))


def _kernel(
    q: Float[Array, "tokens heads head_size"],
    kv_pages: _KVPages,
    sequences: PagedSequences,
    num_seqs: Int[Array, "1"],
    queries_per_block: int,
) -> Float[Array, "tokens heads head_size"]:
    head_size, itemsize = kv_pages.shape[3], kv_pages.dtype.itemsize
    kv_heads = kv_pages.shape[2] // 2
    _, pages_per_seq = sequences.page_table.shape
    shape = KernelShape(kv_pages.shape[1], pages_per_seq, q.shape[1], kv_heads, head_size, itemsize)
    blocks = blocks_for(shape, queries_per_block)
    out = ragged_paged_attention(
        _pad_lanes(q),
        kv_pages,
        jnp.maximum(sequences.kv_lens, 1),
        sequences.page_table,
        sequences.query_starts,
        num_seqs,
        sm_scale=1 / math.sqrt(q.shape[2]),
        num_kv_pages_per_block=blocks.kv_pages,
        num_queries_per_block=blocks.queries,
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
    )
    return out[..., : q.shape[2]]


def _attend_without_kernel(
    q: Float[Array, "tokens heads head_size"], kv_pages: _KVPages, sequences: PagedSequences
) -> Float[Array, "tokens heads head_size"]:
    """Attend over the same pages in plain XLA; legend as in `paged_xla`."""
    _, page_size, two_kv_heads, lanes = kv_pages.shape
    head_size = q.shape[2]

    def read_block(indices: Int[Array, "N W"]) -> tuple[Float[Array, "N K D T"], Float[Array, "N K T D"]]:
        kv = kv_pages.at[indices].get(mode="clip")
        kv = kv.reshape(indices.shape[0], -1, two_kv_heads // 2, 2, lanes)[..., :head_size]
        return kv[:, :, :, 0].transpose(0, 2, 3, 1), kv[:, :, :, 1].transpose(0, 2, 1, 3)

    return attend_in_tiles(q, in_blocks(read_block, page_size), sequences, two_kv_heads // 2)


def _kernel_tiles(two_kv_heads: int, itemsize: int) -> bool:
    """Return whether the kernel supports this number of key and value heads: their 32-bit rows must fill tiles."""
    packing = 4 // itemsize
    rows = two_kv_heads // packing
    return two_kv_heads % packing == 0 and (rows in (1, 2, 4) or rows % 8 == 0)


def _lane_padding(head_size: int) -> int:
    return -head_size % _LANES


def _pad_lanes(heads: Float[Array, "tokens heads head_size"]) -> Float[Array, "tokens heads lanes"]:
    return jnp.pad(heads, ((0, 0), (0, 0), (0, _lane_padding(heads.shape[2]))))
