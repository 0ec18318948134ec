"""Rotary position embedding in Hugging Face's layout: component i turns with component i + head_size / 2.

The frequencies are numpy constants made on the host; the rotation of a batch of positions is computed once and
used by every layer. Knows nothing of caches or of where a position comes from.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosine and sine of every angle, fp32, shared by all heads."""

    cos: Float[Array, "*lead 1 half_head"]
    sin: Float[Array, "*lead 1 half_head"]


def rope_frequencies(head_size: int, theta: float) -> Float[np.ndarray, " half_head"]:
    """Radians per position of each pair: `theta ** (-2 i / head_size)`, fp32."""
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    return (np.float32(1.0) / np.float32(theta) ** exponents).astype(np.float32)


def llama3_scaled_frequencies(
    frequencies: Float[np.ndarray, " half_head"],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_seq_len: int,
) -> Float[np.ndarray, " half_head"]:
    """Llama 3.1's frequencies for contexts `factor` times longer than the original one, fp32.

    A pair that turns more than `high_freq_factor` times within the original context keeps its frequency, one that
    turns less than `low_freq_factor` times is slowed by `factor`, and those between are blended linearly.
    """
    turns = original_max_seq_len * frequencies.astype(np.float64) / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / factor)).astype(np.float32)


def rotation(positions: Int[Array, "*lead"], frequencies: Float[np.ndarray, " half_head"]) -> Rotation:
    """The rotation of each position, fp32."""
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies).reshape(
        (1,) * (positions.ndim + 1) + frequencies.shape
    )
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Float[Array, "*lead heads head_size"], turn: Rotation) -> Float[Array, "*lead heads head_size"]:
    """Turn the pairs (i, i + head_size / 2) of each head; computed in fp32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@jax.custom_vjp
def apply_rope_by_product(
    x: Float[Array, "*lead heads head_size"], turn: Rotation
) -> Float[Array, "*lead heads head_size"]:
    """As `apply_rope`, for TPUs: partners are brought together by a product with a matrix of 0, 1 and -1.

    It is exact, in any dtype. Half a head is half a vector of the machine: to split heads there XLA lays positions
    along its vectors, and moves everything around attention twice. Differentiable once, in reverse, in x alone.
    """
    return _turned(x, turn.cos, turn.sin)


def _turned(
    x: Float[Array, "*lead heads head_size"],
    cos: Float[Array, "*lead 1 half_head"],
    sin: Float[Array, "*lead 1 half_head"],
) -> Float[Array, "*lead heads head_size"]:
    one, zero = np.eye(cos.shape[-1]), np.zeros((cos.shape[-1], cos.shape[-1]))
    crossed = jnp.asarray(np.block([[zero, one], [-one, zero]]), x.dtype)
    partners = jax.lax.dot_general(
        x,
        crossed,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([half, half], axis=-1) for half in (cos, sin))
    return (x.astype(jnp.float32) * cos + partners * sin).astype(x.dtype)


def _turned_forward(x: Array, turn: Rotation) -> tuple[Array, Rotation]:
    return apply_rope_by_product(x, turn), turn


def _turned_backward(turn: Rotation, d_out: Array) -> tuple[Array, None]:
    # The transpose of a turn is the turn back.
    return _turned(d_out, turn.cos, -turn.sin), None


apply_rope_by_product.defvjp(_turned_forward, _turned_backward)
