"""The compiled update against a plain reference, and what must not change its result."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama, init_llama
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig
from simpo_pipeline.training.step import PairArrays, batch_loss, place_batch
from simpo_pipeline.training.trainer import Trainer


def plain_logits(model: Llama, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    """Llama written out on raw arrays, layer by layer: [sequences, seq, vocab]."""

    def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * scale[None, None]

    def turned(x: jax.Array) -> jax.Array:
        half = config.head_dim // 2
        frequency = config.rope_theta ** (-np.arange(half, dtype=np.float32) / np.float32(half))
        angle = jnp.asarray(np.outer(np.arange(seq, dtype=np.float32), frequency))[None, :, None, :]
        first, second = x[..., :half], x[..., half:]
        return jnp.concatenate(
            [first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle)], -1
        )

    seq, group = tokens.shape[1], config.num_heads // config.num_kv_heads
    future = np.triu(np.full((seq, seq), -np.inf, dtype=np.float32), k=1)[None, None]
    x = model.embedding.array[tokens]
    weights = model.layers
    for layer in range(config.num_layers):
        h = normed(x, weights.attn_norm.array[layer])
        q, k, v = (jnp.einsum("bse,hde->bshd", h, w.array[layer]) for w in (weights.wq, weights.wk, weights.wv))
        k, v = (jnp.repeat(heads, group, axis=2) for heads in (turned(k), v))
        scores = jnp.einsum("bshd,bthd->bhst", turned(q), k) / np.sqrt(np.float32(config.head_dim)) + future
        attended = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, axis=-1), v)
        x = x + jnp.einsum("bshd,ehd->bse", attended, weights.wo.array[layer])
        h = normed(x, weights.mlp_norm.array[layer])
        gate, up = (jnp.einsum("bse,me->bsm", h, w.array[layer]) for w in (weights.w_gate, weights.w_up))
        x = x + jnp.einsum("bsm,em->bse", jax.nn.silu(gate) * up, weights.w_down.array[layer])
    return jnp.einsum("bse,ve->bsv", normed(x, model.final_norm.array), model.embedding.array)


def plain_loss(model: Llama, config: LlamaConfig, batch: PairArrays, simpo: SimpoConfig) -> jax.Array:
    """SimPO with two separate forward passes over full logits."""

    def average(tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(plain_logits(model, config, tokens), axis=-1)[:, :-1]
        picked = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
        return (picked * mask[:, :-1]).sum(axis=1) / mask[:, :-1].sum(axis=1)

    chosen, rejected = (average(batch.tokens[:, side], batch.loss_mask[:, side]) for side in (0, 1))
    return jnp.mean(jnp.logaddexp(0.0, -simpo.beta * (chosen - rejected - simpo.gamma_beta_ratio)))


# Compiled once for all tests, by config: on a busy machine compiling is what these tests cost.
@functools.partial(jax.jit, static_argnames=("config", "simpo"))
def plain_loss_and_gradient(
    params: Llama, config: LlamaConfig, batch: PairArrays, simpo: SimpoConfig
) -> tuple[jax.Array, Llama]:
    return jax.value_and_grad(plain_loss)(params, config, batch, simpo)


@functools.partial(jax.jit, static_argnames=("config",))
def loss_and_gradient(params: Llama, batch: PairArrays, config: TrainerConfig) -> tuple[jax.Array, Llama]:
    return jax.value_and_grad(lambda params: batch_loss(params, batch, config)[0])(params)


@pytest.fixture
def params(tiny_model: LlamaConfig) -> Llama:
    return init_llama(tiny_model, jax.random.key(1))


@pytest.fixture
def batch(loader: PairLoader, one_device: Mesh) -> PairArrays:
    return place_batch(loader.batch(0), one_device)


def assert_equal_up_to_rounding(got: tuple[jax.Array, Llama], expected: tuple[jax.Array, Llama]) -> None:
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    assert_trees_close(got[1], expected[1], rtol=2e-5)


def assert_trees_close(got: Any, expected: Any, rtol: float) -> None:
    """Equal up to `rtol` of each leaf's largest entry."""
    for (path, expected_leaf), leaf in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        atol = rtol * float(np.abs(expected_leaf).max())
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_loss_and_gradient_equal_a_plain_reference(params, tiny_model, tiny_run, batch):
    expected = plain_loss_and_gradient(params, tiny_model, batch, tiny_run.simpo)
    assert_equal_up_to_rounding(loss_and_gradient(params, batch, tiny_run), expected)


def test_the_compiled_update_applies_that_gradient_and_reports_its_norm(
    params, tiny_model, tiny_run, loader, batch, programs, one_device
):
    config = dataclasses.replace(tiny_run, optimizer=OptimizerConfig(max_grad_norm=1e6, beta1=0.5))
    _, expected = plain_loss_and_gradient(params, tiny_model, batch, config.simpo)
    trainer = Trainer(config, tiny_model, params, programs=programs, mesh=one_device)
    seen: list[dict[str, float]] = []
    trainer.train_until(1, loader, lambda step, metrics: seen.append(metrics))
    # From zero, one update leaves (1 - beta1) times the gradient in Adam's first moment.
    gradient = jax.tree.map(lambda moment: np.asarray(moment) * 2, adam_state(trainer).mu)
    assert_trees_close(gradient, expected, rtol=2e-5)
    assert seen[0]["grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)


def adam_state(trainer: Trainer) -> optax.ScaleByAdamState:
    def is_adam(part: object) -> bool:
        return isinstance(part, optax.ScaleByAdamState)

    (adam,) = (part for part in jax.tree.leaves(trainer.state.opt_state, is_leaf=is_adam) if is_adam(part))
    return adam


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_chunks_of_the_vocabulary_do_not_change_loss_or_gradient(chunk_size, params, tiny_run, batch):
    chunked = dataclasses.replace(tiny_run, logprob_chunk_size=chunk_size)
    assert_equal_up_to_rounding(loss_and_gradient(params, batch, chunked), loss_and_gradient(params, batch, tiny_run))


def test_recomputing_layers_does_not_change_loss_or_gradient(params, tiny_run, batch):
    remat = dataclasses.replace(tiny_run, remat=True)
    assert_equal_up_to_rounding(loss_and_gradient(params, batch, remat), loss_and_gradient(params, batch, tiny_run))


@pytest.mark.parametrize(("seq_len", "pad_id"), [(16, 39), (33, 5)])
def test_neither_length_nor_token_of_the_padding_changes_loss_or_gradient(
    seq_len, pad_id, params, tiny_run, five_pairs, batch, one_device, make_loader
):
    longer = make_loader(five_pairs, dataclasses.replace(tiny_run, train_seq_len=seq_len), pad_id=pad_id)
    padded = place_batch(longer.batch(0), one_device)
    assert_equal_up_to_rounding(loss_and_gradient(params, padded, tiny_run), loss_and_gradient(params, batch, tiny_run))


def test_bfloat16_compute_comes_close_and_keeps_a_float32_gradient(params, tiny_run, batch):
    loss, gradient = loss_and_gradient(params, batch, tiny_run)
    half = dataclasses.replace(tiny_run, compute_dtype="bfloat16")
    half_loss, half_gradient = loss_and_gradient(params, batch, half)
    assert float(half_loss) == pytest.approx(float(loss), rel=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_gradient)} == {jnp.dtype(jnp.float32)}
    assert_trees_close(half_gradient, gradient, rtol=0.1)


def test_an_update_consumes_the_state_it_was_given(tiny_model, tiny_run, loader, programs, one_device):
    trainer = Trainer.start_random(tiny_run, tiny_model, programs=programs, mesh=one_device)
    before = jax.tree.leaves(trainer.params)
    trainer.train_until(1, loader, lambda step, metrics: None)
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.state))


def test_a_batch_is_placed_with_the_chosen_response_first(loader, one_device):
    rows = loader.batch(3)
    placed = place_batch(rows, one_device)
    np.testing.assert_array_equal(placed.tokens[:, 0], rows.chosen_tokens)
    np.testing.assert_array_equal(placed.tokens[:, 1], rows.rejected_tokens)
    np.testing.assert_array_equal(placed.loss_mask[:, 0], rows.chosen_loss_mask)
    np.testing.assert_array_equal(placed.loss_mask[:, 1], rows.rejected_loss_mask)
