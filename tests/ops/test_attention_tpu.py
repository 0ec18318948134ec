"""The splash kernel, interpreted, against the definition; for TPUs it is only compiled (`tests/preflight`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.ops.attention import Segments, causal_attention_reference
from simpo_pipeline.ops.attention_tpu import kernel_supports, splash_attention


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    shapes = ((2, 256, 4, 128), (2, 256, 2, 128), (2, 256, 2, 128))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def test_its_outputs_and_gradients_equal_the_reference(qkv):
    def loss(attend):
        return lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)))

    def interpreted(q, k, v):
        return splash_attention(q, k, v, interpret=True)

    ours, theirs = interpreted(*qkv), causal_attention_reference(*qkv)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    gradients, wanted = (jax.grad(loss(f), (0, 1, 2))(*qkv) for f in (interpreted, causal_attention_reference))
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize(
    ("seq", "head_size", "segments", "taken"),
    [
        (4096, 128, None, True),
        (4000, 128, None, False),
        (4096, 64, None, False),
        (128, 128, Segments(jnp.zeros((1, 128), jnp.int32)), False),
    ],
    ids=["an 8B model", "a length that blocks do not divide", "half a vector a head", "packed rows"],
)
def test_unsupported_shapes_use_the_plain_implementation(seq, head_size, segments, taken):
    assert kernel_supports(seq, head_size, segments) == taken
