"""Both attention implementations against a loop in numpy, and against each other, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.ops.attention import ATTENDED, Segments, causal_attention, causal_attention_reference
from simpo_pipeline.ops.packed_attention import packed_attention

IMPLEMENTATIONS = [causal_attention_reference, causal_attention]


def _inputs(seq, heads, kv_heads, dtype=jnp.float32, batch=2, head_size=8):
    rng = np.random.default_rng(seq)
    return tuple(
        jnp.asarray(rng.standard_normal((batch, seq, n, head_size)), dtype) for n in (heads, kv_heads, kv_heads)
    )


def _by_loops(q, k, v, segment_ids=None):
    """Compute attention by its definition, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, h in np.ndindex(*q.shape[:3]):
        kv_head = h // (q.shape[2] // k.shape[2])
        keys = [t for t in range(s + 1) if segment_ids is None or segment_ids[b, t] == segment_ids[b, s]]
        scores = k[b, keys, kv_head] @ q[b, s, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, s, h] = weights / weights.sum() @ v[b, keys, kv_head]
    return out


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
@pytest.mark.parametrize(("seq", "heads", "kv_heads"), [(1, 2, 2), (3, 4, 1), (7, 6, 2), (16, 9, 3)])
def test_attention_equals_its_definition(attend, seq, heads, kv_heads):
    q, k, v = _inputs(seq, heads, kv_heads)
    np.testing.assert_allclose(jax.jit(attend)(q, k, v), _by_loops(q, k, v), atol=2e-6)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_a_position_reads_only_its_own_segment(attend):
    q, k, v = _inputs(9, 4, 2)
    segment_ids = np.asarray([[0] * 4 + [1] * 5, [3] * 2 + [1] * 6 + [0]], np.int32)
    got = jax.jit(attend)(q, k, v, Segments(jnp.asarray(segment_ids)))
    np.testing.assert_allclose(got, _by_loops(q, k, v, segment_ids), atol=2e-6)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_changing_a_later_position_never_changes_an_earlier_one(attend):
    q, k, v = _inputs(10, 4, 2)
    before = jax.jit(attend)(q, k, v)
    after = jax.jit(attend)(*(x.at[:, 6:].set(7.0) for x in (q, k, v)))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert not np.array_equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("seq", [3, 10, 16])
def test_gradients_of_both_implementations_agree(seq):
    q, k, v = _inputs(seq, 6, 2)
    cotangent = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    expected, got = (jax.jit(lambda *x, f=f: jax.vjp(f, *x)[1](cotangent))(q, k, v) for f in IMPLEMENTATIONS)
    for one, other in zip(expected, got, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("attend", IMPLEMENTATIONS)
def test_bfloat16_inputs_give_bfloat16_within_its_rounding(attend):
    q, k, v = _inputs(12, 4, 2, dtype=jnp.bfloat16)
    got = jax.jit(attend)(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), _by_loops(q, k, v), atol=0.03)


# Per row, its pairs as (all tokens, end of branch 0, end of branch 1); the rest of a row is padding.
PACKED_ROWS = [[(70, 10, 25), (64, 64, 64), (9, 0, 4)], [(100, 1, 99), (3, 2, 3)]]
SLOT_LENS = (128, 64, 64)


def _packed_inputs(row_len: int) -> tuple[tuple[jax.Array, ...], Segments]:
    ids, branches = np.full((2, row_len), -1, np.int32), np.zeros((2, row_len), np.int32)
    slots = np.zeros((2, 3, 2), np.int32)
    for row, pairs in enumerate(PACKED_ROWS):
        first = 0
        for number, (tokens, shared, second) in enumerate(pairs):
            at = np.arange(first, first + tokens)
            ids[row, at] = number
            branches[row, at] = np.where(at < first + shared, 0, np.where(at < first + second, 1, 2))
            slots[row, number] = first, tokens
            first += tokens
    inputs = (x.reshape(2, row_len, -1, 8) for x in _inputs(row_len, 6, 2))
    return tuple(inputs), Segments(jnp.asarray(ids), jnp.asarray(branches), jnp.asarray(slots))


# In rows of 144, the last window would exceed the row and therefore starts earlier; in rows of 256, none does.
@pytest.mark.parametrize("row_len", [144, 256])
def test_attention_by_slots_and_its_gradients_equal_attention_over_the_whole_row(row_len):
    (q, k, v), segments = _packed_inputs(row_len)
    held = segments.ids[:, :, None, None] >= 0
    cotangent = jnp.where(held, jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape), 0)

    def by_slots(q, k, v):
        return packed_attention(q, k, v, segments, SLOT_LENS)

    def over_all(q, k, v):
        return causal_attention_reference(q, k, v, segments)

    def attended_and_gradients(attend):
        attended, pullback = jax.vjp(attend, q, k, v)
        return attended, pullback(cotangent)

    (attended, gradients), (expected, expected_gradients) = jax.tree.map(
        np.asarray, [jax.jit(attended_and_gradients, static_argnums=0)(attend) for attend in (by_slots, over_all)]
    )
    np.testing.assert_allclose(attended, np.where(held, expected, 0), atol=2e-6)
    for by_slot, whole in zip(gradients, expected_gradients, strict=True):
        assert not by_slot[~np.broadcast_to(held, by_slot.shape)].any()
        np.testing.assert_allclose(by_slot, whole, atol=5e-6)


def test_attention_by_slots_is_the_same_with_rematerialisation():
    (q, k, v), segments = _packed_inputs(256)

    def total(q, k, v):
        return packed_attention(q, k, v, segments, SLOT_LENS).sum()

    plain = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    for policy in (None, jax.checkpoint_policies.save_only_these_names(ATTENDED)):
        again = jax.jit(jax.grad(jax.checkpoint(total, policy=policy), (0, 1, 2)))(q, k, v)
        for expected, got in zip(plain, again, strict=True):
            np.testing.assert_array_equal(expected, got)
