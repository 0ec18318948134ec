"""Block sizes of the TPU kernel, chosen so that its working set fits in vector memory (VMEM). Pure arithmetic.

By default the kernel looks up its block sizes by the name of the process's first device. Prefill of an 8B model then
needed 37.5 MiB, with a limit of 16 MiB.
"""

import dataclasses

# XLA's default limit for a kernel on a v5p. Also passed to the kernel, so that no flag of the process changes it.
VMEM_LIMIT_BYTES = 16 * 2**20
# `vmem_bytes` was an upper bound of the compiler's usage in every setting tried. The margin is for other compilers.
_VMEM_BUDGET_BYTES = 12 * 2**20
# Keys of one sequence that are read together. Each read copies a whole block, so longer blocks slow short sequences.
_KEYS_PER_BLOCK = 512
_LANES = 128
_SUBLANE_BYTES = 32


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """Sizes of the kernel's inputs on one device."""

    page_size: int
    pages_per_seq: int
    heads: int
    kv_heads: int
    head_size: int
    itemsize: int
    """Bytes per element of q and of the pages."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the kernel's blocks: pages of keys and values, and queries."""

    kv_pages: int
    queries: int


def vmem_bytes(shape: KernelShape, blocks: Blocks) -> int:
    """Return an upper bound of the kernel's VMEM usage: its buffers and the intermediate results of all heads.

    The kernel processes the heads one by one, but its loop is unrolled and the compiler starts heads early.
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
    """Return the largest blocks that fit in VMEM, up to the preferred sizes.

    A block has `max_queries` queries, or fewer if VMEM is short.

    Raises:
        ValueError: Not even one page and one query fit.
    """
    blocks = Blocks(kv_pages=min(max(1, _KEYS_PER_BLOCK // shape.page_size), shape.pages_per_seq), queries=max_queries)
    while vmem_bytes(shape, blocks) > _VMEM_BUDGET_BYTES:
        if blocks.queries > 1:
            blocks = dataclasses.replace(blocks, queries=blocks.queries // 2)
        elif blocks.kv_pages > 1:
            blocks = dataclasses.replace(blocks, kv_pages=blocks.kv_pages // 2)
        else:
            raise ValueError(
                f"one page of {shape.page_size} tokens with {shape.kv_heads} key/value heads of size "
                f"{shape.head_size} per device needs {vmem_bytes(shape, blocks)} bytes of VMEM, but the budget is "
                f"{_VMEM_BUDGET_BYTES}. Decrease page_size."
            )
    return blocks


def _tiled(heads: int, itemsize: int) -> int:
    """Return the number of heads rounded up to whole VMEM tiles, whose number of rows depends on `itemsize`."""
    tile = _SUBLANE_BYTES // itemsize
    return -(-heads // tile) * tile
