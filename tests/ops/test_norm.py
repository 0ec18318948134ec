"""RMS norm against its formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.ops.norm import rms_norm


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_rows_are_scaled_to_unit_root_mean_square(shape):
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal(shape) * 30, rng.standard_normal(8)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-5)
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_epsilon_bounds_the_scale_of_small_rows_and_keeps_a_row_of_zeros_at_zero():
    x = np.random.default_rng(0).standard_normal((3, 8)) * np.array([[1e-3], [1e-6], [0.0]])
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.ones(8, jnp.float32), 1e-5)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert np.isfinite(np.asarray(got)).all()


def test_bfloat16_rows_are_normed_in_fp32_and_rounded_once():
    x = np.linspace(100.0, 101.0, 64)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    scale = np.linspace(0.5, 1.5, 64)
    got = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.float32), 1e-5)
    expected = rounded / np.sqrt((rounded**2).mean() + 1e-5) * scale
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last place of bfloat16's 8 bits: one rounding, not two.
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8 * 1.001)
