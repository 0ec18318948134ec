"""Matmuls with [out, in] weights against float64, forward and backward, in both dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.ops.linear import linear, transposed_matmul


def _inputs(rows, dtype, weight_dtype=jnp.float32, in_size=24, out_size=16):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, in_size)), dtype)
    return x, jnp.asarray(rng.standard_normal((out_size, in_size)), weight_dtype)


@pytest.mark.parametrize("rows", [(), (1,), (7,), (64,), (3, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
def test_linear_and_its_gradients_equal_float64_matmuls(rows, dtype, tolerance):
    x, weight = _inputs(rows, dtype)
    out, pull = jax.vjp(jax.jit(linear), x, weight)
    cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(dtype)
    d_x, d_weight = jax.jit(pull)(cotangent)

    x64, g64 = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, cotangent))
    w64 = np.asarray(weight.astype(dtype), np.float64)
    for got, expected in ((out, x64 @ w64.T), (d_x, g64 @ w64), (d_weight, g64.T @ x64)):
        close = {"rtol": tolerance, "atol": tolerance * np.abs(expected).max()}
        np.testing.assert_allclose(np.asarray(got, np.float64).reshape(expected.shape), expected, **close)
    assert (out.dtype, d_x.dtype, d_weight.dtype) == (dtype, dtype, jnp.float32)


@pytest.mark.parametrize(
    ("num_in", "out_shape", "in_shape"), [(1, (4, 4), (24,)), (2, (16,), (4, 6)), (2, (4, 4), (4, 6))]
)
def test_several_axes_for_one_matrix_axis_change_neither_output_nor_gradients(num_in, out_shape, in_shape):
    x, weight = _inputs((3, 5), jnp.float32)

    def apart(x: jax.Array, weight: jax.Array) -> jax.Array:
        out: Any = linear(x.reshape(3, 5, *in_shape), weight.reshape(*out_shape, *in_shape), transposed_matmul, num_in)
        return out.reshape(3, 5, -1)

    for found, expected in zip(
        _out_and_gradients(apart, x, weight), _out_and_gradients(linear, x, weight), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


def _out_and_gradients(function, x, weight):
    out, pull = jax.vjp(function, x, weight)
    return out, *pull(jnp.cos(out))


def test_the_gradient_of_an_fp32_weight_is_summed_in_fp32_and_not_rounded_to_the_compute_dtype():
    x = jnp.ones((512, 8), jnp.bfloat16)
    weight = jnp.zeros((8, 8), jnp.float32)
    # 511 ones and a bfloat16-representable 1/128: a sum that bfloat16 cannot represent.
    cotangent = jnp.ones((512, 8), jnp.bfloat16).at[0].set(1 / 128)
    _, pull = jax.vjp(linear, x, weight)
    np.testing.assert_array_equal(pull(cotangent)[1], np.full((8, 8), 511 + 1 / 128, np.float32))


@pytest.mark.parametrize("rows", [5, 24, 64, 200])
@pytest.mark.parametrize(("out_size", "in_size"), [(6, 10), (10, 6), (7, 5), (64, 32), (96, 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_number_of_rows_can_be_contracted_whichever_side_is_wider(rows, out_size, in_size, dtype):
    left, right = (_inputs((rows,), dtype, in_size=size)[0] for size in (out_size, in_size))
    got = jax.jit(transposed_matmul)(left, right)
    np.testing.assert_allclose(got, np.asarray(left, np.float64).T @ np.asarray(right, np.float64), atol=1e-4)
