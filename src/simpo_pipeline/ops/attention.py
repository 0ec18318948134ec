"""Causal self-attention over whole sequences, with grouped key/value heads.

`causal_attention_reference` is the definition and the reference for the tests; models call `causal_attention`.
Neither knows about caches or pages: see `paged_attention` for generation.

Legend: B batch, S query position, T key position, K key/value head, G query head within its group, D head_size,
R row of a matmul: (G, S) of one block of queries.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# Each block of queries reads the keys up to its own end. With many blocks the work is little more than half of the full
# square, but each block adds its own code to the program. Forward and backward of [6, 1024, 9 heads on 3, 64] in fp32
# on 2 CPU cores: 309 ms in 4 blocks, 250 in 8, 247 in 16; of [4, 384, ...]: 26 in 3, 23 in 6.
_MAX_BLOCKS = 16
_MIN_BLOCK_SIZE = 64
# The `jax.checkpoint` name of the forward results that the backward pass needs.
ATTENDED = "attended"


class Segments(NamedTuple):
    """The tokens of a row that attend to each other.

    A token attends to itself and to the earlier tokens of its segment that are on its own branch or on branch 0.
    """

    ids: Int[Array, "batch seq"]
    branches: Int[Array, "batch seq"] | None = None
    """Alternative continuations of a segment after its tokens of branch 0; None if every token is on branch 0."""
    slots: Int[Array, "batch slots 2"] | None = None
    """First position and number of tokens of each slot of a row. No token attends outside its slot.

    Only `packed_attention` uses them.
    """


def causal_attention_reference(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    segments: Segments | None = None,
) -> Float[Array, "batch seq heads head_size"]:
    """Compute softmax attention of each position over itself and the earlier positions of its segment.

    Query head h reads key/value head `h // (heads // kv_heads)`. Scores and softmax are fp32; the result has q's
    dtype. Without `segments` each row is one segment.
    """
    batch, seq, heads, head_size = q.shape
    kv_heads = k.shape[2]
    q_BSKGD = q.reshape(batch, seq, kv_heads, heads // kv_heads, head_size)
    scores_BKGST = jnp.einsum("BSKGD,BTKD->BKGST", q_BSKGD, k, preferred_element_type=jnp.float32)
    weights_BKGST = _masked_softmax(scores_BKGST / math.sqrt(head_size), _allowed(0, seq, segments))
    out_BSKGD = jnp.einsum("BKGST,BTKD->BSKGD", weights_BKGST.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out_BSKGD.reshape(q.shape).astype(q.dtype)


def causal_attention(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    segments: Segments | None = None,
) -> Float[Array, "batch seq heads head_size"]:
    """Compute the same function as `causal_attention_reference`, faster and in less memory.

    One implementation, built from matmuls, serves every backend. The queries of a group are rows of one matmul, and
    the key/value heads are never repeated. Differentiable once, in reverse mode.
    """
    return _differentiable(q, k, v, segments)


@jax.custom_vjp
def _differentiable(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    return _forward(q, k, v, segments)[0]


def _forward(q: Array, k: Array, v: Array, segments: Segments | None) -> tuple[Array, tuple[Any, ...]]:
    out, log_sums = checkpoint_name(attend(q, k, v, segments), ATTENDED)
    return out, (q, k, v, segments, out, log_sums)


def attend(q: Array, k: Array, v: Array, segments: Segments | None) -> tuple[Array, list[Array]]:
    """Return the attention output, and for each block of queries the log-sum-exp of each query's scores.

    `attend_gradient` needs both. As in FlashAttention (Dao et al. 2022, arXiv 2205.14135), it recomputes the attention
    weights instead of storing them.
    """
    k_BKDT, v_BKTD = k.transpose(0, 2, 3, 1), jnp.swapaxes(v, 1, 2)
    out, log_sums = [], []
    for start, stop in _blocks(q.shape[1]):
        scores = _scores(_rows(q, start, stop, k.shape[2]), k_BKDT, start, stop, segments)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        exponentials = jnp.exp(scores - peak)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        weighted = _batched_matmul(exponentials.astype(v.dtype), v_BKTD[:, :, :stop], contract=(3, 2)) / total
        out.append(_undo_rows(weighted.astype(q.dtype), stop - start))
        log_sums.append(peak + jnp.log(total))
    return jnp.concatenate(out, axis=1), log_sums


def _backward(saved: tuple[Any, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, log_sums = saved
    return *attend_gradient(q, k, v, segments, out, log_sums, d_out), None


def attend_gradient(
    q: Array, k: Array, v: Array, segments: Segments | None, out: Array, log_sums: list[Array], d_out: Array
) -> tuple[Array, Array, Array]:
    """Return the gradients of q, k and v, given the results of `attend` and the gradient of its output."""
    kv_heads, scale = k.shape[2], 1 / math.sqrt(q.shape[3])
    k_BKDT, v_BKDT, k_BKTD = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1), jnp.swapaxes(k, 1, 2)
    d_k_BKDT, d_v_BKDT = jnp.zeros(k_BKDT.shape, jnp.float32), jnp.zeros(v_BKDT.shape, jnp.float32)
    d_q = []
    for (start, stop), log_sum in zip(_blocks(q.shape[1]), log_sums, strict=True):
        q_rows, out_rows, d_rows = (_rows(array, start, stop, kv_heads) for array in (q, out, d_out))
        weights = jnp.exp(_scores(q_rows, k_BKDT, start, stop, segments) - log_sum)
        d_weights = _batched_matmul(d_rows, v_BKDT[:, :, :, :stop], contract=(3, 2))
        from_total = jnp.sum((d_rows * out_rows).astype(jnp.float32), axis=-1, keepdims=True)
        d_scores = (weights * (d_weights - from_total) * scale).astype(q.dtype)
        # XLA's CPU matmuls are slow when both sides are contracted over rows and the wide one is on the left.
        d_v_BKDT = d_v_BKDT.at[:, :, :, :stop].add(_batched_matmul(d_rows, weights.astype(v.dtype), contract=(2, 2)))
        d_k_BKDT = d_k_BKDT.at[:, :, :, :stop].add(_batched_matmul(q_rows, d_scores, contract=(2, 2)))
        d_block = _batched_matmul(d_scores, k_BKTD[:, :, :stop], contract=(3, 2))
        d_q.append(_undo_rows(d_block.astype(q.dtype), stop - start))
    d_k, d_v = d_k_BKDT.transpose(0, 3, 1, 2).astype(k.dtype), d_v_BKDT.transpose(0, 3, 1, 2).astype(v.dtype)
    return jnp.concatenate(d_q, axis=1), d_k, d_v


_differentiable.defvjp(_forward, _backward)


def _blocks(seq: int) -> list[tuple[int, int]]:
    """Return the (start, stop) positions of each block of queries."""
    size = max(_MIN_BLOCK_SIZE, -(-seq // _MAX_BLOCKS))
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _rows(x: Float[Array, "batch seq heads D"], start: int, stop: int, kv_heads: int) -> Float[Array, "batch K R D"]:
    """Select a block of positions and group it by key/value head: R = (query head in group, position)."""
    batch, _, heads, head_size = x.shape
    x_BSKGD = x[:, start:stop].reshape(batch, stop - start, kv_heads, heads // kv_heads, head_size)
    return x_BSKGD.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_size)


def _undo_rows(x: Float[Array, "batch K R D"], num_positions: int) -> Float[Array, "batch block heads D"]:
    """Undo `_rows`."""
    batch, kv_heads, _, head_size = x.shape
    x_BSKGD = x.reshape(batch, kv_heads, -1, num_positions, head_size).transpose(0, 3, 1, 2, 4)
    return x_BSKGD.reshape(batch, num_positions, -1, head_size)


def _scores(
    q_rows: Float[Array, "batch K R D"],
    k_BKDT: Float[Array, "batch K D seq"],
    start: int,
    stop: int,
    segments: Segments | None,
) -> Float[Array, "batch K R keys"]:
    """Return the fp32 scores of queries [start, stop) against keys [0, stop); -inf where a query may not attend."""
    scores = _batched_matmul(q_rows, k_BKDT[:, :, :, :stop], contract=(3, 2)) / math.sqrt(q_rows.shape[3])
    batch, kv_heads, rows, keys = scores.shape
    by_position = (batch, kv_heads, rows // (stop - start), stop - start, keys)
    mask = jnp.broadcast_to(_allowed(start, stop, segments)[:, None, None], by_position)
    return jnp.where(mask.reshape(scores.shape), scores, -jnp.inf)


def _batched_matmul(
    left: Float[Array, "batch K a b"], right: Float[Array, "batch K c d"], contract: tuple[int, int]
) -> Float[Array, "batch K rows out"]:
    """Contract one axis of each side, per sequence and key/value head, with an fp32 result."""
    dimensions = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _masked_softmax(
    scores_BKGST: Float[Array, "batch kv_heads group rows keys"], allowed: Bool[Array, "batch_or_1 rows keys"]
) -> Float[Array, "batch kv_heads group rows keys"]:
    mask = jnp.broadcast_to(allowed[:, None, None], scores_BKGST.shape)
    return jax.nn.softmax(jnp.where(mask, scores_BKGST, -jnp.inf), axis=-1)


def _allowed(start: int, stop: int, segments: Segments | None) -> Bool[Array, "batch_or_1 rows stop"]:
    """Return which keys [0, stop) each query [start, stop) attends to. Each reads its own, so no softmax is empty."""
    causal = jnp.tril(jnp.ones((1, stop - start, stop), dtype=bool), k=start)
    if segments is None:
        return causal
    together = segments.ids[:, start:stop, None] == segments.ids[:, None, :stop]
    if segments.branches is not None:
        keys = segments.branches[:, None, :stop]
        together &= (keys == 0) | (keys == segments.branches[:, start:stop, None])
    return together & jnp.broadcast_to(causal, together.shape)
