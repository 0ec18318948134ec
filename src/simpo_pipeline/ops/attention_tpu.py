"""Causal attention over whole sequences on TPUs: JAX's splash kernel, on each device over its own rows and heads.

The body in plain XLA (`attention`) writes every block of scores to HBM, in fp32, and reads it several times; the kernel
keeps them on the chip. It knows rows that are one segment each, of a length that its blocks divide; others take the
plain body. Which of the two it is follows from the shapes.
"""

import math
from collections.abc import Callable

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    make_splash_mha_single_device,
)
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from simpo_pipeline.ops.attention import ATTENDED, Segments, causal_attention

# Vectors of the machine are so long, and the kernel's blocks are made of whole ones.
_LANES = 128
_LARGEST_BLOCK = 512

# As `attention.causal_attention`.
CausalAttention = Callable[[Array, Array, Array, Segments | None], Array]


def splash_attention(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_size"]:
    """`attention.causal_attention` of rows of one segment each, on one device; see `kernel_takes`.

    `interpret` runs it on any device, for tests.
    """
    seq, heads, head_size = q.shape[1:]
    block = math.gcd(seq, _LARGEST_BLOCK)
    kernel = make_splash_mha_single_device(
        MultiHeadMask([CausalMask((seq, seq))] * heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    q_BHSD, k_BHSD, v_BHSD = (array.swapaxes(1, 2) for array in (q * (1 / math.sqrt(head_size)), k, v))
    out_BHSD: Array = jax.vmap(kernel)(q_BHSD, k_BHSD, v_BHSD)  # pyright: ignore[reportAssignmentType]
    # For the backward pass: XLA else takes sums over the gradient into the product that makes it, and halves its speed.
    return jax.lax.optimization_barrier(out_BHSD).swapaxes(1, 2)


def kernel_takes(seq: int, head_size: int, segments: Segments | None) -> bool:
    """Whether the kernel can attend over such rows."""
    return segments is None and seq % _LANES == 0 and head_size % _LANES == 0


def causal_attention_on(mesh: Mesh, rows_axis: str, heads_axis: str) -> CausalAttention:
    """`causal_attention` for TPUs with rows split over one axis of the mesh, and heads over another if it divides them.

    Each device's part is computed there, without any traffic.
    """

    def attend(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
        if not kernel_takes(q.shape[1], q.shape[3], segments):
            return causal_attention(q, k, v, segments)
        splits = k.shape[2] % mesh.shape[heads_axis] == 0
        placed = PartitionSpec(rows_axis, None, heads_axis if splits else None)
        # The kernel does not say over which axes its result varies.
        on_each = jax.shard_map(splash_attention, mesh=mesh, in_specs=placed, out_specs=placed, check_vma=False)
        return on_each(q, k, v)

    return attend
