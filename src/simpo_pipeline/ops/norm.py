"""Root-mean-square normalisation. Knows nothing of models: one array, one scale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*lead embed"], scale: Float[Array, " embed"], eps: float) -> Float[Array, "*lead embed"]:
    """`x / sqrt(mean(x**2) + eps) * scale` over the last axis, computed in fp32 and returned in x's dtype."""
    wide = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    normed = wide * inverse_rms * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return normed.astype(x.dtype)
