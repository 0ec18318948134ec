"""Paged attention for GPUs: a Pallas kernel over pages [slot, kv_head, head_size], run by each device on its own heads.

The kernel supports head sizes of 16, 32, 64, ... elements, up to 512 bytes. Other shapes use plain XLA, which is
slower. On one H200, single queries of 8 heads of 128 elements took 8 to 42 times as long in plain XLA, and 3 to 4 times
as long in cuDNN over gathered pages (benchmarks/gpu_attention.py). Chunks were not compared.

Legend: as in `paged_xla`; O slot within a page.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages
from simpo_pipeline.ops.paged_xla import (
    KEYS_PER_BLOCK,
    AttendTiles,
    QueryTiles,
    attend_in_tiles,
    copy_pages,
    in_blocks,
    storable_values,
)


@dataclasses.dataclass(frozen=True)
class GpuPagedAttention:
    """`PagedAttention` with key/value heads sharded over the axis `axis` of `mesh`, if its size divides their number.

    The kernel is interpreted on devices other than GPUs.
    """

    mesh: Mesh
    axis: str
    name: ClassVar[str] = "gpu"
    default_page_size: ClassVar[int] = KEYS_PER_BLOCK
    keys_per_block: ClassVar[int | None] = KEYS_PER_BLOCK
    kv_heads_axis: ClassVar[int] = 2

    def empty(self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> Pages:
        """Return two arrays of zeros of `dtype`, keys and values: [pages, page_size, kv_heads, head_size]."""
        shape = (num_pages, page_size, kv_heads, head_size)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def write(self, pages: Pages, tokens: NewTokens) -> Pages:
        """See `PagedAttention.write`."""
        keys, values = pages
        at = tokens.page, tokens.slot
        return keys.at[at].set(tokens.k, mode="drop"), values.at[at].set(storable_values(tokens.v), mode="drop")

    def copy(self, pages: Pages, source: Int[Array, " n"], target: Int[Array, " n"]) -> Pages:
        """See `PagedAttention.copy`."""
        return copy_pages(pages, source, target)

    def attend(
        self, q: Float[Array, "tokens heads head_size"], pages: Pages, sequences: PagedSequences
    ) -> Float[Array, "tokens heads head_size"]:
        """See `PagedAttention.attend`."""
        divides = pages[0].shape[self.kv_heads_axis] % self.mesh.shape[self.axis] == 0
        axis = self.axis if divides else None
        heads, kv_heads, replicated = PartitionSpec(None, axis), PartitionSpec(None, None, axis), PartitionSpec()
        interpret = self.mesh.devices.flat[0].platform != "gpu"
        return jax.shard_map(
            functools.partial(_attend_on_one_device, interpret=interpret),
            mesh=self.mesh,
            in_specs=(heads, kv_heads, replicated),
            out_specs=heads,
            # The kernel does not declare over which mesh axes its result varies.
            check_vma=False,
        )(q, pages, sequences)


def _attend_on_one_device(
    q: Float[Array, "tokens heads head_size"], pages: Pages, sequences: PagedSequences, *, interpret: bool
) -> Float[Array, "tokens heads head_size"]:
    keys, values = pages
    return attend_in_tiles(q, _in_kernel(keys, values, interpret=interpret), sequences, keys.shape[2])


def _in_kernel(keys: Float[Array, "P O K D"], values: Float[Array, "P O K D"], *, interpret: bool) -> AttendTiles:
    # Imported here because jobs on other devices must not depend on a backend that JAX deprecates.
    from simpo_pipeline.ops import paged_gpu_kernel

    def attend(tiles: QueryTiles) -> Float[Array, "N K R D"]:
        _, _, rows, head_size = tiles.q_NKRD.shape
        if not paged_gpu_kernel.takes(rows, head_size, keys.dtype.itemsize):
            return in_xla(keys, values)(tiles)
        return paged_gpu_kernel.attend_in_ranges(tiles, keys, values, interpret=interpret)

    return attend


def in_xla(keys: Float[Array, "P O K D"], values: Float[Array, "P O K D"]) -> AttendTiles:
    """Return `AttendTiles` over the keys and values of these pages, in plain XLA."""

    def read_block(indices: Int[Array, "N W"]) -> tuple[Float[Array, "N K D T"], Float[Array, "N K T D"]]:
        block = (indices.shape[0], -1, *keys.shape[2:])
        k_NTKD = keys.at[indices].get(mode="clip").reshape(block)
        v_NTKD = values.at[indices].get(mode="clip").reshape(block)
        return k_NTKD.transpose(0, 2, 3, 1), v_NTKD.transpose(0, 2, 1, 3)

    return in_blocks(read_block, keys.shape[1])
