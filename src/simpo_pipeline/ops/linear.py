"""Matrix products with weights stored [out, in], in the layouts and dtypes that XLA runs fast.

On CPUs with AMX, XLA multiplies bfloat16 several times faster than fp32, but only in products that sum into fp32 and
contract the last axis of the left side; all others it widens to fp32 first. So every product here asks for fp32 sums,
and the weight gradient transposes an operand by itself. Knows nothing of axis names or of layers.

GFLOP/s of [2048, 576] x [1536, 576] on 2 such cores that others used too (alone they reach 2 to 4 times as much):
fp32 72, bfloat16 to bfloat16 67, `linear` in bfloat16 237; its weight gradient in bfloat16 65 as autodiff writes it,
225 here.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

# Rows moved together by `_transposed`; a tile [64, columns] stays in cache. 16 to 128 were equally fast.
_TILE_ROWS = 64


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "..."]:
    """Contract one axis of each side, with fp32 sums and an fp32 result."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def transposed_product(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Float[Array, "out in"]:
    """`left.T @ right` with fp32 sums and an fp32 result."""
    if left.dtype != jnp.bfloat16:
        return product(left, right, 0, 0)
    return jax.lax.platform_dependent(
        left, right, cpu=_transposed_product_on_amx, default=lambda left, right: product(left, right, 0, 0)
    )


# (rows of out, rows of in) -> their product [out, in], summed over the rows in fp32.
TransposedProduct = Callable[[Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "*rows in"], weight: Float[Array, "out in"], transposed: TransposedProduct = transposed_product
) -> Float[Array, "*rows out"]:
    """`x @ weight.T`: computed in x's dtype with fp32 sums, returned in x's dtype.

    The weight may have another float dtype; its gradient comes in that dtype, summed in fp32 and rounded once, by
    `transposed`, a `transposed_product` that may know where its result is to lie.
    """
    return product(x, weight.astype(x.dtype), x.ndim - 1, 1).astype(x.dtype)


def _linear_forward(x: Array, weight: Array, transposed: TransposedProduct) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, weight, transposed), (x, weight)


def _linear_backward(transposed: TransposedProduct, saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, weight = saved
    d_x = product(d_out, weight.astype(x.dtype), x.ndim - 1, 0).astype(x.dtype)
    rows = math.prod(x.shape[:-1])
    d_weight = transposed(d_out.reshape(rows, -1), x.reshape(rows, -1))
    return d_x, d_weight.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def scattered_product(
    mesh: Mesh, rows_axes: tuple[str, ...], out_axis: str | None, in_axis: str | None
) -> TransposedProduct:
    """A `transposed_product` of rows split over axes of a mesh, each device left with its part of the sum.

    `out_axis` and `in_axis` say over which axes of the mesh the result's are split, one of them over the first of
    `rows_axes`; over the others each part is then summed whole. What does not fall into equal parts is left to XLA.

    XLA by itself multiplies in slices that are slower than one product, or sums the whole result on every device; so
    does its TPU backend with an explicit reduce-scatter over many chips. Hence parts are exchanged, and summed where
    they arrive.
    """
    split, *others = rows_axes

    def scattered(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Float[Array, "out in"]:
        # Parts are of the first axis: of the last they would lie in strides.
        if in_axis == split:
            return sum_of(transposed_product(right, left)).T
        return sum_of(transposed_product(left, right))

    def sum_of(whole: Float[Array, "split other"]) -> Float[Array, "part other"]:
        by_part = whole.reshape(mesh.shape[split], -1, whole.shape[1])
        part = jax.lax.all_to_all(by_part, split, 0, 0).sum(axis=0)
        return jax.lax.psum(part, others) if others else part

    def rows_placed(axis: str | None) -> PartitionSpec:
        return PartitionSpec(rows_axes, None if axis in rows_axes else axis)

    in_specs = rows_placed(out_axis), rows_placed(in_axis)
    on_each = jax.shard_map(
        scattered, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(out_axis, in_axis), check_vma=False
    )

    def multiply(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Float[Array, "out in"]:
        scattered_len = left.shape[1] if out_axis == split else right.shape[1]
        divides = left.shape[0] % math.prod(mesh.shape[axis] for axis in rows_axes) == 0
        return (on_each if divides and scattered_len % mesh.shape[split] == 0 else transposed_product)(left, right)

    return multiply


def _transposed_product_on_amx(left: Float[Array, "rows out"], right: Float[Array, "rows in"]) -> Array:
    # XLA fuses the transpose with what made the operand, and then walks it in strides: let that be the narrow side.
    if left.shape[1] > right.shape[1]:
        return _transposed(_transposed_product_on_amx(right, left))
    return product(_transposed(left), right, 1, 0)


def _transposed(x: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """x.T in two passes: XLA's CPU transpose of a matrix walks memory in strides, ten times slower."""
    rows, columns = x.shape
    tile = math.gcd(rows, _TILE_ROWS)
    tiles = jnp.swapaxes(x.reshape(rows // tile, tile, columns), 1, 2)
    # Without the barrier XLA merges the two passes, and the transpose into the product.
    return jnp.swapaxes(jax.lax.optimization_barrier(tiles), 0, 1).reshape(columns, rows)
