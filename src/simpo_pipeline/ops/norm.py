"""Root-mean-square normalisation of one array with one scale. This module does not know about models."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*lead embed"], scale: Float[Array, " embed"], eps: float) -> Float[Array, "*lead embed"]:
    """Return `x / sqrt(mean(x**2) + eps) * scale` over the last axis, computed in fp32, in x's dtype."""
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = wide * inverse_rms * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return normed.astype(x.dtype)
