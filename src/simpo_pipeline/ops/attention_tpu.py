"""Causal attention over whole sequences on TPUs: JAX's splash kernel, run by each device on its own rows and heads.

The plain XLA implementation (`attention`) writes every block of scores to HBM, in fp32, and reads it several times. The
kernel keeps the scores on the chip. It supports rows of one segment each, whose length its blocks divide. All other
rows use the plain implementation. The shapes, and whether there are segments, decide which of the two runs.
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

# Length of a TPU vector. The kernel's blocks consist of whole vectors.
_LANES = 128
_LARGEST_BLOCK = 512

# The signature of `attention.causal_attention`.
CausalAttention = Callable[[Array, Array, Array, Segments | None], Array]


def splash_attention(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    *,
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_size"]:
    """Compute `attention.causal_attention` on one device for rows of one segment each; see `kernel_supports`.

    `interpret` runs the kernel on any device, for tests.
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
    # For the backward pass: without the barrier XLA fuses sums over the gradient into the matmul that computes it, and
    # that matmul runs at half the speed.
    return jax.lax.optimization_barrier(out_BHSD).swapaxes(1, 2)


def kernel_supports(seq: int, head_size: int, segments: Segments | None) -> bool:
    """Return whether the kernel supports rows of this shape."""
    return segments is None and seq % _LANES == 0 and head_size % _LANES == 0


def causal_attention_on(mesh: Mesh, rows_axis: str, heads_axis: str) -> CausalAttention:
    """Return `causal_attention` for TPUs, with rows sharded over `rows_axis` of the mesh and heads over `heads_axis`.

    Heads are sharded only if the size of `heads_axis` divides the number of key/value heads. Each device computes its
    own shard without communication.
    """

    def attend(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
        if not kernel_supports(q.shape[1], q.shape[3], segments):
            return causal_attention(q, k, v, segments)
        splits = k.shape[2] % mesh.shape[heads_axis] == 0
        placed = PartitionSpec(rows_axis, None, heads_axis if splits else None)
        # The kernel does not declare over which mesh axes its result varies.
        on_each = jax.shard_map(splash_attention, mesh=mesh, in_specs=placed, out_specs=placed, check_vma=False)
        return on_each(q, k, v)

    return attend
