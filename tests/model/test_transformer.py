"""The forward pass: shapes, causality, and what each option may and may not change."""

import dataclasses
from functools import partial

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis, NamedArray

from simpo_pipeline.model.config import Llama3RopeScaling
from simpo_pipeline.model.transformer import (
    ANYWHERE,
    UnstackedLlama,
    abstract_llama,
    attend_whole_sequences,
    frequencies,
    logits,
    merged_layers,
    transform,
    unembedding,
    unstacked,
)
from simpo_pipeline.ops.attention import Segments


def _tokens(config, batch=2, seq=10):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, seq)).astype(np.int32)
    return tokens, np.broadcast_to(np.arange(seq, dtype=np.int32), tokens.shape)


@partial(jax.jit, static_argnames=("dtype", "remat", "placement"))
def _logits(model, tokens, positions, *, segments=None, dtype=jnp.float32, remat="none", placement=ANYWHERE):
    axes = (Axis("sequence", tokens.shape[0]), Axis("position", tokens.shape[1]))
    hidden, _ = transform(
        model,
        NamedArray(tokens, axes),
        NamedArray(positions, axes),
        attend=attend_whole_sequences,
        state=segments,
        dtype=dtype,
        remat=remat,
        placement=placement,
    )
    return logits(model, hidden)


# Enough values to measure their spread.
LARGER = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.3}


@pytest.mark.parametrize("tied", [False, True])
def test_random_parameters_have_the_abstract_trees_shapes_and_the_configs_count(small_config, random_model, tied):
    config = dataclasses.replace(small_config, **LARGER, tie_word_embeddings=tied)
    model, abstract = random_model(config, jax.random.key(0)), abstract_llama(config, jnp.float32)
    assert jax.tree.structure(model) == jax.tree.structure(abstract)
    for leaf, expected in zip(jax.tree.leaves(model), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == config.num_parameters
    assert (model.head is None) == tied


def test_random_matrices_spread_as_the_config_says_and_no_two_are_equal(small_config, random_model):
    config = dataclasses.replace(small_config, **LARGER)
    model = random_model(config, jax.random.key(0))
    matrices = [leaf for leaf in jax.tree.leaves(model) if leaf.ndim > 1 and not (leaf == 1).all()]
    assert len(matrices) == 9
    for matrix in matrices:
        np.testing.assert_allclose(np.std(matrix), 0.3, rtol=0.05)
        np.testing.assert_allclose(np.mean(matrix), 0.0, atol=0.02)
    assert len({float(matrix.ravel()[0]) for matrix in matrices}) == len(matrices)


def test_logits_are_fp32_over_the_leading_axes_and_the_vocabulary(small_config, small_model):
    got = _logits(small_model, *_tokens(small_config), dtype=jnp.bfloat16)
    assert [(axis.name, axis.size) for axis in got.axes] == [("sequence", 2), ("position", 10), ("vocab", 96)]
    assert got.dtype == jnp.float32


def test_a_tied_head_is_the_embedding(small_config, small_model):
    tied = dataclasses.replace(small_model, head=None)
    assert unembedding(tied) is tied.embedding
    assert unembedding(small_model) is small_model.head
    copied = dataclasses.replace(small_model, head=small_model.embedding)
    batch = _tokens(small_config)
    np.testing.assert_array_equal(_logits(tied, *batch).array, _logits(copied, *batch).array)


def test_grouped_heads_equal_full_attention_with_keys_and_values_repeated(small_config, small_model):
    group = small_config.num_heads // small_config.num_kv_heads

    def repeated(weight):
        array = jnp.repeat(weight.array, group, axis=1)
        return NamedArray(array, (weight.axes[0], Axis("kv_heads", array.shape[1]), *weight.axes[2:]))

    layers = dataclasses.replace(
        small_model.layers, wk=repeated(small_model.layers.wk), wv=repeated(small_model.layers.wv)
    )
    full = dataclasses.replace(
        small_model, layers=layers, config=dataclasses.replace(small_config, num_kv_heads=small_config.num_heads)
    )
    batch = _tokens(small_config)
    np.testing.assert_allclose(_logits(full, *batch).array, _logits(small_model, *batch).array, atol=1e-5)


def test_changing_a_later_token_never_changes_earlier_logits(small_config, small_model):
    tokens, positions = _tokens(small_config)
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % small_config.vocab_size
    before, after = (_logits(small_model, t, positions).array for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(axis=-1).all()


def test_padding_after_a_sequence_changes_nothing_in_it(small_config, small_model):
    tokens, positions = _tokens(small_config)
    padded = np.concatenate([tokens, np.zeros((2, 6), np.int32)], axis=1)
    wide = np.broadcast_to(np.arange(16, dtype=np.int32), padded.shape)
    np.testing.assert_allclose(
        _logits(small_model, padded, wide).array[:, :10], _logits(small_model, tokens, positions).array, atol=1e-5
    )


def test_two_segments_in_a_row_give_the_logits_of_two_rows(small_config, small_model):
    tokens, positions = _tokens(small_config)
    packed = tokens.reshape(1, -1)
    segments = jnp.repeat(jnp.arange(2, dtype=jnp.int32), 10)[None]
    together = _logits(small_model, packed, positions.reshape(1, -1), segments=Segments(segments))
    apart = _logits(small_model, tokens, positions)
    np.testing.assert_allclose(together.array.reshape(apart.array.shape), apart.array, atol=1e-5)


def test_only_distances_between_positions_matter(small_config, small_model):
    tokens, positions = _tokens(small_config)
    shifted = _logits(small_model, tokens, positions + 20).array
    np.testing.assert_allclose(shifted, _logits(small_model, tokens, positions).array, atol=1e-4)
    stretched = _logits(small_model, tokens, positions * 3).array
    assert np.abs(stretched - shifted).max() > 0.1


def test_rope_scaling_of_the_config_reaches_the_model(small_config):
    scaled = dataclasses.replace(small_config, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 16))
    plain = frequencies(small_config)
    assert frequencies(scaled)[-1] == np.float32(plain[-1] / 8)
    assert frequencies(scaled).shape == plain.shape == (4,)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_rematerialisation_changes_no_gradient(small_config, small_model, dtype):
    tokens, positions = _tokens(small_config)

    def gradient(remat):
        def loss(model):
            return hax.mean(_logits(model, tokens, positions, dtype=dtype, remat=remat)).scalar()

        return jax.jit(jax.grad(loss))(small_model)

    kept = gradient("none")
    for remat in ("products", "full"):
        for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(gradient(remat)), strict=True):
            assert one.dtype == jnp.float32
            assert (one != 0).any()
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * float(np.abs(one).max()))


def test_heads_that_stay_an_axis_of_matmuls_change_no_gradient(small_config, small_model):
    tokens, positions = _tokens(small_config)

    def loss(model, placement):
        return hax.mean(_logits(model, tokens, positions, placement=placement)).scalar()

    kept, flat = (
        jax.jit(jax.grad(partial(loss, placement=ANYWHERE._replace(keeps_heads=keeps))))(small_model)
        for keeps in (True, False)
    )
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(flat), strict=True):
        assert (one != 0).any()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * float(np.abs(one).max()))


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_merged_by_part_and_unstacked_give_the_same_logits(small_config, random_llama, parts):
    # 128 query rows, 64 key rows, 256 merged rows: XLA's kernels sum all of these in the same order, unlike 48, 16 and
    # 80 rows.
    config = dataclasses.replace(small_config, num_heads=8, num_kv_heads=4, head_dim=16)
    model = random_llama(config)
    merged = jax.jit(lambda layers: unstacked(merged_layers(layers, parts)))(model.layers)
    by_layer = UnstackedLlama(model.embedding, merged, model.final_norm, model.head, config)
    expected = _logits(model, *_tokens(config)).array
    np.testing.assert_allclose(_logits(by_layer, *_tokens(config)).array, expected, atol=2e-6)


def test_bfloat16_logits_are_close_to_the_fp32_ones(small_config, small_model):
    batch = _tokens(small_config)
    exact, rounded = (_logits(small_model, *batch, dtype=dtype).array for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(rounded, exact, atol=0.03 * float(np.abs(exact).max()))


def test_each_layer_gets_its_index_and_the_state_of_the_previous_layer(small_config, small_model):
    tokens, positions = (array[0] for array in _tokens(small_config))
    token = Axis("token", tokens.size)

    def record(layer, q, k, v, seen):
        assert (q.shape, k.shape, v.shape) == ((10, 6, 8), (10, 2, 8), (10, 2, 8))
        return q, seen.at[layer].add(seen.max() + 1)

    _, seen = jax.jit(
        lambda model: transform(
            model,
            NamedArray(jnp.asarray(tokens), (token,)),
            NamedArray(jnp.asarray(positions), (token,)),
            attend=record,
            state=jnp.zeros(3, jnp.int32),
            dtype=jnp.float32,
        )
    )(small_model)
    np.testing.assert_array_equal(seen, [1, 2, 3])
