"""Rotary embedding against transformers' frequencies, complex rotation in float64, and dependence on distance alone."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.ops.rope import (
    apply_rope,
    apply_rope_by_matmul,
    llama3_scaled_frequencies,
    rope_frequencies,
    rotation,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers_llama3_rope.json"


def test_llama3_frequencies_equal_transformers():
    golden = json.loads(GOLDEN.read_text())
    rope = golden["config"]["rope_parameters"]
    head_size = golden["config"]["hidden_size"] // golden["config"]["num_attention_heads"]
    got = llama3_scaled_frequencies(
        rope_frequencies(head_size, rope["rope_theta"]),
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_seq_len=rope["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(got, golden["frequencies"], rtol=5e-7)


def test_fast_pairs_keep_their_frequency_and_slow_ones_are_slowed_by_the_factor():
    frequencies = np.asarray([1.0, 1e-5], np.float32)
    got = llama3_scaled_frequencies(
        frequencies, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    np.testing.assert_allclose(got, [1.0, 1e-5 / 8], rtol=1e-6)


def test_each_pair_is_rotated_by_its_position_times_its_frequency():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8))
    positions = np.asarray([[0, 1, 2, 3, 4], [7, 900, 13, 0, 8000]], np.int32)
    frequencies = rope_frequencies(8, 10_000.0)
    turns = np.exp(1j * positions[..., None, None] * frequencies.astype(np.float64))
    rotated = (x[..., :4] + 1j * x[..., 4:]) * turns
    got = apply_rope(jnp.asarray(x, jnp.float32), rotation(jnp.asarray(positions), frequencies))
    # An fp32 angle of 8000 radians is accurate to half of 2**-11.
    np.testing.assert_allclose(got, np.concatenate([rotated.real, rotated.imag], axis=-1), atol=1e-3)
    np.testing.assert_allclose(got[0], np.concatenate([rotated.real, rotated.imag], axis=-1)[0], atol=2e-6)


def test_dot_products_of_queries_and_keys_depend_only_on_their_distance():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies = rope_frequencies(16, 10_000.0)

    def dot_product(query_position, key_position):
        rotated = (
            apply_rope(x, rotation(jnp.asarray([position], jnp.int32), frequencies))
            for x, position in ((q, query_position), (k, key_position))
        )
        return float(jnp.vdot(*rotated))

    np.testing.assert_allclose(dot_product(103, 100), dot_product(3, 0), rtol=1e-4)
    assert abs(dot_product(103, 100) - dot_product(103, 99)) > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_by_a_matmul_and_its_gradient_are_the_same(dtype):
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(rng.standard_normal((2, 5, 3, 8)), dtype) for _ in range(2))
    turn = rotation(jnp.asarray(rng.integers(0, 4096, (2, 5)), jnp.int32), rope_frequencies(8, 10_000.0))
    out, pull = jax.vjp(lambda x: apply_rope_by_matmul(x, turn), x)
    expected, expected_pull = jax.vjp(lambda x: apply_rope(x, turn), x)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pull(d_out)[0], expected_pull(d_out)[0])
