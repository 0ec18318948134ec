"""How large the blocks of the TPU kernel are, so that what it keeps in vector memory (VMEM) fits: pure arithmetic.

Left to itself the kernel looks its sizes up by the name of the first device of the process. Prefill of an 8B model
then wanted 37.5 MiB of a 16 MiB limit.
"""

import dataclasses

# What XLA grants a kernel by default on a v5p. Given to the kernel too, so that no flag of the process changes it.
VMEM_LIMIT_BYTES = 16 * 2**20
# `vmem_bytes` bounds what the compiler took in every setting tried; the rest is for other compilers.
_VMEM_BUDGET_BYTES = 12 * 2**20
# Keys of one sequence read together. Each read copies whole blocks, so longer ones cost short sequences more.
_KEYS_PER_BLOCK = 512
_LANES = 128
_SUBLANE_BYTES = 32


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """What the kernel sees on one device."""

    page_size: int
    pages_per_seq: int
    heads: int
    kv_heads: int
    head_size: int
    itemsize: int
    """Bytes of a number in q and in the pages."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What the kernel works on at a time."""

    kv_pages: int
    queries: int


def vmem_bytes(shape: KernelShape, blocks: Blocks) -> int:
    """An upper bound of what the kernel takes: its buffers, and the intermediate results of all heads.

    The kernel goes over the heads one by one, but in a loop that is unrolled, and the compiler starts them early.
    """
    keys, rows = blocks.kv_pages * shape.page_size, blocks.queries * (shape.heads // shape.kv_heads)
    kv_buffers = 2 * keys * _tiled(2 * shape.kv_heads, shape.itemsize) * shape.head_size * shape.itemsize
    q = blocks.queries * _tiled(shape.heads, shape.itemsize) * shape.head_size * shape.itemsize
    accumulator = blocks.queries * _tiled(shape.heads, 4) * shape.head_size * 4
    peaks_and_totals = 2 * shape.kv_heads * rows * _LANES * 4
    scores_and_kv_in_fp32 = shape.kv_heads * (rows * keys + 2 * keys * shape.head_size) * 4
    # q and the output are double-buffered by the pipeline.
    return kv_buffers + 4 * q + accumulator + peaks_and_totals + scores_and_kv_in_fp32


def blocks_for(shape: KernelShape, max_queries: int) -> Blocks:
    """The largest blocks up to the wanted ones that fit; `max_queries` a block, fewer where VMEM is short."""
    blocks = Blocks(kv_pages=min(max(1, _KEYS_PER_BLOCK // shape.page_size), shape.pages_per_seq), queries=max_queries)
    while vmem_bytes(shape, blocks) > _VMEM_BUDGET_BYTES:
        if blocks.queries > 1:
            blocks = dataclasses.replace(blocks, queries=blocks.queries // 2)
        elif blocks.kv_pages > 1:
            blocks = dataclasses.replace(blocks, kv_pages=blocks.kv_pages // 2)
        else:
            raise ValueError(
                f"one page of {shape.page_size} tokens, {shape.kv_heads} key/value heads of {shape.head_size} on a "
                f"device takes {vmem_bytes(shape, blocks)} bytes of VMEM, of {_VMEM_BUDGET_BYTES}. Decrease page_size."
            )
    return blocks


def _tiled(heads: int, itemsize: int) -> int:
    """Heads as they are laid out in VMEM: numbers of `itemsize` bytes come in tiles of so many rows."""
    tile = _SUBLANE_BYTES // itemsize
    return -(-heads // tile) * tile
