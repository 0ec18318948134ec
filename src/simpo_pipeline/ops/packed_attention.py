"""Causal self-attention over rows that contain several pairs each, computed pair by pair.

`attention.causal_attention` gives the same result for such rows, but it computes the scores of all earlier tokens of
the row and discards those of other pairs: seven eighths of them for 8 pairs in a row. Here each slot of a row has a
window of static length, and a token attends within its own window. Windows of the same length are computed together.

Legend: N window, L token of a window, H head (of q, or of k and v), D head_size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from simpo_pipeline.ops.attention import ATTENDED, Segments, attend, attend_gradient


class _Windows(NamedTuple):
    """The windows of one length in all rows, as slices of the flattened [batch * seq] tokens."""

    starts: Int[Array, " N"]
    in_slot: Bool[Array, "N L"]
    """Which tokens belong to the slot. The tokens before and after them belong to other slots, or are padding."""


def packed_attention(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    segments: Segments,
    slot_lens: tuple[int, ...],
) -> Float[Array, "batch seq heads head_size"]:
    """Compute `attention.causal_attention` for rows in which no token attends outside its slot.

    `segments.slots` gives the position and the number of tokens of each slot of a row. `slot_lens` gives the maximum
    number of tokens of each slot, which must not exceed the row length. The result is 0 for tokens in no slot.
    Differentiable once, in reverse mode.
    """
    return _differentiable(q, k, v, segments, slot_lens)


def packed_attention_on(
    mesh: Mesh, rows_axis: str, heads_axis: str, slot_lens: tuple[int, ...]
) -> Callable[[Array, Array, Array, Segments], Array]:
    """Return `packed_attention` with rows sharded over `rows_axis` of the mesh and heads over `heads_axis`.

    Heads are sharded only if the size of `heads_axis` divides the number of key/value heads; otherwise each device
    computes all heads. Each device computes its own shard without communication.
    """

    def attend_local(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        return packed_attention(q, k, v, segments, slot_lens)

    def attend_sharded(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        splits = k.shape[2] % mesh.shape[heads_axis] == 0
        placed = PartitionSpec(rows_axis, None, heads_axis if splits else None)
        in_specs = (placed, placed, placed, PartitionSpec(rows_axis))
        # The loops over windows start with arrays that do not vary over mesh axes, and end with arrays that do.
        return jax.shard_map(attend_local, mesh=mesh, in_specs=in_specs, out_specs=placed, check_vma=False)(
            q, k, v, segments
        )

    return attend_local if mesh.size == 1 else attend_sharded


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(q: Array, k: Array, v: Array, segments: Segments, slot_lens: tuple[int, ...]) -> Array:
    return _forward(q, k, v, segments, slot_lens)[0]


def _forward(
    q: Array, k: Array, v: Array, segments: Segments, slot_lens: tuple[int, ...]
) -> tuple[Array, tuple[Any, ...]]:
    out, log_sums = jnp.zeros_like(q), []
    for windows in _windows(segments, slot_lens, q.shape[1]):
        q_NLHD, k_NLHD, v_NLHD = (_take_windows(array, windows) for array in (q, k, v))
        attended, by_block = attend(q_NLHD, k_NLHD, v_NLHD, _segments_of(segments, windows))
        out = _add_windows(out, windows, _zero_outside_slots(attended, windows))
        log_sums.append(by_block)
    out, log_sums = checkpoint_name((out, log_sums), ATTENDED)
    return out, (q, k, v, segments, out, log_sums)


def _backward(slot_lens: tuple[int, ...], saved: tuple[Any, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, log_sums = saved
    gradients = [jnp.zeros_like(array) for array in (q, k, v)]
    for windows, by_block in zip(_windows(segments, slot_lens, q.shape[1]), log_sums, strict=True):
        q_NLHD, k_NLHD, v_NLHD, out_NLHD = (_take_windows(array, windows) for array in (q, k, v, out))
        d_out_NLHD = _zero_outside_slots(_take_windows(d_out, windows), windows)
        window_segments = _segments_of(segments, windows)
        # Tokens outside the slot get zero gradients: their outputs were dropped, and no token of the slot reads them.
        found = attend_gradient(q_NLHD, k_NLHD, v_NLHD, window_segments, out_NLHD, by_block, d_out_NLHD)
        gradients = [_add_windows(whole, windows, part) for whole, part in zip(gradients, found, strict=True)]
    d_q, d_k, d_v = gradients
    return d_q, d_k, d_v, None


_differentiable.defvjp(_forward, _backward)


def _windows(segments: Segments, slot_lens: tuple[int, ...], seq: int) -> list[_Windows]:
    """Return the windows of each length, longest first.

    A window that would extend past the end of its row starts earlier.
    """
    slots = segments.slots
    assert slots is not None, "rows without slots"
    found = []
    for length in sorted(set(slot_lens), reverse=True):
        first, tokens = jnp.moveaxis(slots[:, [index for index, size in enumerate(slot_lens) if size == length]], 2, 0)
        starts = jnp.minimum(first, seq - length)
        offsets = jnp.arange(length)[None, None] - (first - starts)[:, :, None]
        in_slot = (offsets >= 0) & (offsets < tokens[:, :, None])
        flat_starts = starts + seq * jnp.arange(len(slots))[:, None]
        found.append(_Windows(flat_starts.reshape(-1), in_slot.reshape(-1, length)))
    return found


def _segments_of(segments: Segments, windows: _Windows) -> Segments:
    branches = None if segments.branches is None else _take_windows(segments.branches, windows)
    return Segments(_take_windows(segments.ids, windows), branches)


def _take_windows(x: Shaped[Array, "batch seq *rest"], windows: _Windows) -> Shaped[Array, "N L *rest"]:
    flat, length = x.reshape(-1, *x.shape[2:]), windows.in_slot.shape[1]
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(flat, start, length))(windows.starts)


def _add_windows(
    x: Shaped[Array, "batch seq *rest"], windows: _Windows, parts: Shaped[Array, "N L *rest"]
) -> Shaped[Array, "batch seq *rest"]:
    """Return x with each part added at the position of its window. Windows may overlap."""
    length = parts.shape[1]

    def add(index: Int[Array, ""], flat: Array) -> Array:
        start = windows.starts[index]
        current = jax.lax.dynamic_slice_in_dim(flat, start, length)
        return jax.lax.dynamic_update_slice_in_dim(flat, current + parts[index], start, 0)

    return jax.lax.fori_loop(0, len(parts), add, x.reshape(-1, *x.shape[2:])).reshape(x.shape)


def _zero_outside_slots(parts: Shaped[Array, "N L heads D"], windows: _Windows) -> Shaped[Array, "N L heads D"]:
    return jnp.where(windows.in_slot[:, :, None, None], parts, 0)
