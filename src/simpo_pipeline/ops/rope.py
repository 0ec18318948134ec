"""Rotary position embedding in Hugging Face's layout: components i and i + head_size / 2 are rotated as a pair.

The frequencies are NumPy constants computed on the host. The rotation of a batch of positions is computed once and
used by every layer. This module does not know about caches or where a position comes from.
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
    """Return the frequency of each pair in radians per position: `theta ** (-2 i / head_size)`, fp32."""
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
    """Return Llama 3.1's frequencies for contexts `factor` times longer than the original context, fp32.

    A pair that rotates more than `high_freq_factor` times within the original context keeps its frequency. The
    frequency of a pair that rotates fewer than `low_freq_factor` times is divided by `factor`. Between the two, the
    frequency is interpolated linearly.
    """
    num_rotations = original_max_seq_len * frequencies.astype(np.float64) / (2 * math.pi)
    kept = np.clip((num_rotations - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / factor)).astype(np.float32)


def rotation(positions: Int[Array, "*lead"], frequencies: Float[np.ndarray, " half_head"]) -> Rotation:
    """Return the rotation of each position, fp32."""
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies).reshape(
        (1,) * (positions.ndim + 1) + frequencies.shape
    )
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x: Float[Array, "*lead heads head_size"], turn: Rotation) -> Float[Array, "*lead heads head_size"]:
    """Rotate the pairs (i, i + head_size / 2) of each head; computed in fp32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@jax.custom_vjp
def apply_rope_by_matmul(
    x: Float[Array, "*lead heads head_size"], turn: Rotation
) -> Float[Array, "*lead heads head_size"]:
    """Compute `apply_rope` for TPUs: a matmul with a matrix of 0, 1 and -1 swaps the components of each pair.

    The matmul is exact in any dtype. Half a head is half a TPU vector: to split heads, XLA would place positions along
    its vectors, and relayout everything around attention twice. Differentiable once, in reverse mode, in x only.
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
    return apply_rope_by_matmul(x, turn), turn


def _turned_backward(turn: Rotation, d_out: Array) -> tuple[Array, None]:
    # The transpose of a rotation is the inverse rotation.
    return _turned(d_out, turn.cos, -turn.sin), None


apply_rope_by_matmul.defvjp(_turned_forward, _turned_backward)
