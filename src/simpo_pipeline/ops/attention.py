"""Causal self-attention over whole sequences, with grouped key/value heads.

`causal_attention_reference` is the definition and the oracle of the tests; `causal_attention` is what models call.
Neither knows of caches or pages: see `paged_attention` for generation.

Legend: B batch, S query position, T key position, K key/value head, G query head within its group, D head_size.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_attention_reference(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads head_size"]:
    """Softmax attention of each position over itself and the earlier positions of its segment.

    Query head h reads key/value head `h // (heads // kv_heads)`. Scores and softmax are fp32; the result has q's
    dtype. Without `segment_ids` each row is one segment.
    """
    batch, seq, heads, head_size = q.shape
    kv_heads = k.shape[2]
    q_BSKGD = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_size)
    scores_BKGST = jnp.einsum("BSKGD,BTKD->BKGST", q_BSKGD, k, preferred_element_type=jnp.float32)
    allowed = jnp.broadcast_to(_allowed(seq, segment_ids)[:, None, None], scores_BKGST.shape)
    scaled = jnp.where(allowed, scores_BKGST / math.sqrt(head_size), -jnp.inf)
    weights_BKGST = jax.nn.softmax(scaled, axis=-1).astype(v.dtype)
    out_BSKGD = jnp.einsum("BKGST,BTKD->BSKGD", weights_BKGST, v, preferred_element_type=jnp.float32)
    return out_BSKGD.reshape(q.shape).astype(q.dtype)


def causal_attention(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads head_size"]:
    """The same function of the same arguments as `causal_attention_reference`, by the fastest body here."""
    return causal_attention_reference(q, k, v, segment_ids)


def _allowed(seq: int, segment_ids: Int[Array, "batch seq"] | None) -> Bool[Array, "batch_or_1 seq seq"]:
    """Which key positions (last axis) each query position may read."""
    causal = jnp.tril(jnp.ones((1, seq, seq), dtype=bool))
    if segment_ids is None:
        return causal
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same_segment & jnp.broadcast_to(causal, same_segment.shape)
