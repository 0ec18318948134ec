"""Matmuls with weights stored as [out, in], in the layouts and dtypes that XLA runs fast.

On CPUs with AMX, XLA multiplies bfloat16 several times faster than fp32, but only in matmuls that accumulate in fp32
and contract the last axis of the left side. It converts the operands of all other matmuls to fp32 first. So every
matmul here requests fp32 accumulation, and the weight gradient transposes an operand explicitly. This module does not
know about axis names or layers.

GFLOP/s of [2048, 576] x [1536, 576] on 2 such cores that others used too (alone they reach 2 to 4 times as much):
fp32 72, bfloat16 to bfloat16 67, `linear` in bfloat16 237; its weight gradient in bfloat16 65 as written by autodiff,
225 here.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

# Rows that `_transposed` moves together. A tile of [64, columns] stays in cache. 16 to 128 rows were equally fast.
_TILE_ROWS = 64


def matmul(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "..."]:
    """Contract one axis of each side, with fp32 accumulation and an fp32 result."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def transposed_matmul(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Float[Array, "out in"]:
    """Return `left.T @ right` with fp32 accumulation and an fp32 result."""
    if left.dtype != jnp.bfloat16:
        return matmul(left, right, 0, 0)
    return jax.lax.platform_dependent(
        left, right, cpu=_transposed_matmul_on_amx, default=lambda left, right: matmul(left, right, 0, 0)
    )


# ([rows, out], [rows, in]) -> [out, in]: their matmul, summed over the rows in fp32.
TransposedMatmul = Callable[[Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(
    x: Float[Array, "*rows_and_in"],
    weight: Float[Array, "*out_and_in"],
    transposed: TransposedMatmul = transposed_matmul,
    num_in: int = 1,
) -> Float[Array, "*rows_and_out"]:
    """Return `x @ weight.T`, computed in x's dtype with fp32 accumulation and returned in x's dtype.

    The last `num_in` axes of both are contracted. The weight may have another float dtype, which its gradient then has
    too. `transposed` computes that gradient: it is `transposed_matmul`, or a variant that shards its result. The
    gradient is summed in fp32 and rounded once.
    """
    return _contracted(x, weight, range(x.ndim - num_in, x.ndim), range(weight.ndim - num_in, weight.ndim))


def _contracted(x: Array, weight: Array, x_axes: range, weight_axes: range) -> Array:
    dimensions = ((tuple(x_axes), tuple(weight_axes)), ((), ()))
    out = jax.lax.dot_general(x, weight.astype(x.dtype), dimensions, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def _linear_forward(
    x: Array, weight: Array, transposed: TransposedMatmul, num_in: int
) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, weight, transposed, num_in), (x, weight)


def _linear_backward(
    transposed: TransposedMatmul, num_in: int, saved: tuple[Array, Array], d_out: Array
) -> tuple[Array, Array]:
    x, weight = saved
    num_rows_axes, num_out = x.ndim - num_in, weight.ndim - num_in
    d_x = _contracted(d_out, weight, range(num_rows_axes, d_out.ndim), range(num_out))
    rows = math.prod(x.shape[:num_rows_axes])
    d_weight = transposed(d_out.reshape(rows, -1), x.reshape(rows, -1))
    return d_x, d_weight.reshape(weight.shape).astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def scattered_matmul(
    mesh: Mesh, rows_axes: tuple[str, ...], *, scatters_in: bool, other_axis: str | None = None
) -> TransposedMatmul:
    """Return a `transposed_matmul` of rows sharded over `rows_axes` of the mesh, with the sum scattered over devices.

    One axis of the result [out, in] is sharded over `rows_axes`: in if `scatters_in`, out otherwise. The other axis is
    sharded over `other_axis`, as it is in its operand. Shapes that do not divide into equal parts are left to XLA.

    XLA on its own multiplies in slices, which is slower than one matmul, or sums the whole result on every device. Its
    TPU backend does the latter even for an explicit reduce-scatter over many chips. So the devices exchange parts, and
    each sums the parts that it receives.
    """
    num_parts = math.prod(mesh.shape[axis] for axis in rows_axes)

    def scattered(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Float[Array, "out_part in_part"]:
        # Parts are taken along the first axis: along the last one they would be strided.
        if scatters_in:
            return sum_of(transposed_matmul(right, left)).T
        return sum_of(transposed_matmul(left, right))

    def sum_of(whole: Float[Array, "scattered other"]) -> Float[Array, "part other"]:
        by_part = whole.reshape(num_parts, -1, whole.shape[1])
        return jax.lax.all_to_all(by_part, rows_axes, 0, 0).sum(axis=0)

    kept, split = PartitionSpec(rows_axes, other_axis), PartitionSpec(rows_axes)
    on_each = jax.shard_map(
        scattered,
        mesh=mesh,
        in_specs=(kept, split) if scatters_in else (split, kept),
        out_specs=PartitionSpec(other_axis, rows_axes) if scatters_in else kept,
        check_vma=False,
    )

    def multiply(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Float[Array, "out in"]:
        divided = left.shape[0], (right if scatters_in else left).shape[1]
        return (transposed_matmul if any(size % num_parts for size in divided) else on_each)(left, right)

    return multiply


def _transposed_matmul_on_amx(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Array:
    # XLA fuses the transpose with the producer of the operand, and then reads it in strides: transpose the narrow side.
    if left.shape[1] > right.shape[1]:
        return _transposed(_transposed_matmul_on_amx(right, left))
    return matmul(_transposed(left), right, 1, 0)


def _transposed(x: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """Return `x.T` in two passes: XLA's CPU transpose of a matrix reads memory in strides and is ten times slower."""
    rows, columns = x.shape
    tile = math.gcd(rows, _TILE_ROWS)
    tiles = jnp.swapaxes(x.reshape(rows // tile, tile, columns), 1, 2)
    # Without the barrier XLA fuses the two passes, and then the transpose into the matmul.
    return jnp.swapaxes(jax.lax.optimization_barrier(tiles), 0, 1).reshape(columns, rows)
