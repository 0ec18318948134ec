"""Causal self-attention over rows that hold several pairs each, pair by pair.

`attention.causal_attention` gives the same for such rows, but computes the scores of all earlier tokens of the row and
throws away those of other pairs: for 8 pairs in a row seven eighths of them. Here each slot of a row has a window of
static length, and a token reads its own window. Windows of one length are attended together.

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
    """The windows of one length of all rows, as parts of the tokens of all rows in one line."""

    starts: Int[Array, " N"]
    held: Bool[Array, "N L"]
    """Which tokens are the slot's: before and after them lie others, or padding."""


def packed_attention(
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    segments: Segments,
    slot_lens: tuple[int, ...],
) -> Float[Array, "batch seq heads head_size"]:
    """`attention.causal_attention` of rows none of whose tokens reads beyond its slot; 0 for tokens in no slot.

    `segments.slots` says where the slots of each row lie, and `slot_lens` how many tokens they hold at most, none more
    than a row. Differentiable once, in reverse.
    """
    return _differentiable(q, k, v, segments, slot_lens)


def packed_attention_on(
    mesh: Mesh, rows_axis: str, heads_axis: str, slot_lens: tuple[int, ...]
) -> Callable[[Array, Array, Array, Segments], Array]:
    """`packed_attention` of rows split over one axis of the mesh, and heads over another if it divides them.

    Each device's part is computed there, without any traffic; where they are not divided, each computes all heads.
    """

    def attend_here(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        return packed_attention(q, k, v, segments, slot_lens)

    def attend_on_each(q: Array, k: Array, v: Array, segments: Segments) -> Array:
        splits = k.shape[2] % mesh.shape[heads_axis] == 0
        placed = PartitionSpec(rows_axis, None, heads_axis if splits else None)
        in_specs = (placed, placed, placed, PartitionSpec(rows_axis))
        # Loops over windows start with arrays that vary over no axis, and end with such that do.
        return jax.shard_map(attend_here, mesh=mesh, in_specs=in_specs, out_specs=placed, check_vma=False)(
            q, k, v, segments
        )

    return attend_here if mesh.size == 1 else attend_on_each


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(q: Array, k: Array, v: Array, segments: Segments, slot_lens: tuple[int, ...]) -> Array:
    return _forward(q, k, v, segments, slot_lens)[0]


def _forward(
    q: Array, k: Array, v: Array, segments: Segments, slot_lens: tuple[int, ...]
) -> tuple[Array, tuple[Any, ...]]:
    out, log_sums = jnp.zeros_like(q), []
    for windows in _windows(segments, slot_lens, q.shape[1]):
        q_NLHD, k_NLHD, v_NLHD = (_taken(array, windows) for array in (q, k, v))
        attended, by_block = attend(q_NLHD, k_NLHD, v_NLHD, _segments_of(segments, windows))
        out = _added(out, windows, _where_held(attended, windows))
        log_sums.append(by_block)
    out, log_sums = checkpoint_name((out, log_sums), ATTENDED)
    return out, (q, k, v, segments, out, log_sums)


def _backward(slot_lens: tuple[int, ...], saved: tuple[Any, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, log_sums = saved
    gradients = [jnp.zeros_like(array) for array in (q, k, v)]
    for windows, by_block in zip(_windows(segments, slot_lens, q.shape[1]), log_sums, strict=True):
        q_NLHD, k_NLHD, v_NLHD, out_NLHD = (_taken(array, windows) for array in (q, k, v, out))
        d_out_NLHD = _where_held(_taken(d_out, windows), windows)
        here = _segments_of(segments, windows)
        # Of tokens that are not the slot's, all gradients are 0: what they gave was dropped, and none of its read them.
        found = attend_gradient(q_NLHD, k_NLHD, v_NLHD, here, out_NLHD, by_block, d_out_NLHD)
        gradients = [_added(whole, windows, part) for whole, part in zip(gradients, found, strict=True)]
    d_q, d_k, d_v = gradients
    return d_q, d_k, d_v, None


_differentiable.defvjp(_forward, _backward)


def _windows(segments: Segments, slot_lens: tuple[int, ...], seq: int) -> list[_Windows]:
    """The windows of each length, the longest first. One that would run over its row's end begins earlier."""
    slots = segments.slots
    assert slots is not None, "rows without slots"
    found = []
    for length in sorted(set(slot_lens), reverse=True):
        first, tokens = jnp.moveaxis(slots[:, [index for index, size in enumerate(slot_lens) if size == length]], 2, 0)
        starts = jnp.minimum(first, seq - length)
        places = jnp.arange(length)[None, None] - (first - starts)[:, :, None]
        held = (places >= 0) & (places < tokens[:, :, None])
        in_line = starts + seq * jnp.arange(len(slots))[:, None]
        found.append(_Windows(in_line.reshape(-1), held.reshape(-1, length)))
    return found


def _segments_of(segments: Segments, windows: _Windows) -> Segments:
    branches = None if segments.branches is None else _taken(segments.branches, windows)
    return Segments(_taken(segments.ids, windows), branches)


def _taken(x: Shaped[Array, "batch seq *rest"], windows: _Windows) -> Shaped[Array, "N L *rest"]:
    in_line, length = x.reshape(-1, *x.shape[2:]), windows.held.shape[1]
    return jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(in_line, start, length))(windows.starts)


def _added(
    x: Shaped[Array, "batch seq *rest"], windows: _Windows, parts: Shaped[Array, "N L *rest"]
) -> Shaped[Array, "batch seq *rest"]:
    """x with the parts added where their windows lie; windows may overlap."""
    length = parts.shape[1]

    def add(index: Int[Array, ""], in_line: Array) -> Array:
        start = windows.starts[index]
        there = jax.lax.dynamic_slice_in_dim(in_line, start, length)
        return jax.lax.dynamic_update_slice_in_dim(in_line, there + parts[index], start, 0)

    return jax.lax.fori_loop(0, len(parts), add, x.reshape(-1, *x.shape[2:])).reshape(x.shape)


def _where_held(parts: Shaped[Array, "N L heads D"], windows: _Windows) -> Shaped[Array, "N L heads D"]:
    return jnp.where(windows.held[:, :, None, None], parts, 0)
