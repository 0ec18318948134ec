"""The compiled update against a plain reference, and options that must not change its result."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.data.rows import packed_rows, packed_shape
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import fsdp_placement
from simpo_pipeline.model.transformer import Llama
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig
from simpo_pipeline.training.step import BatchArrays, answer_logps, loss_and_gradient, place_batch
from simpo_pipeline.training.trainer import Trainer


def plain_logits(model: Llama, config: LlamaConfig, tokens: jax.Array) -> jax.Array:
    """Return the logits [sequences, seq, vocab] of a Llama written out on raw arrays, layer by layer."""

    def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * scale[None, None]

    def rotated(x: jax.Array) -> jax.Array:
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
        k, v = (jnp.repeat(heads, group, axis=2) for heads in (rotated(k), v))
        scores = jnp.einsum("bshd,bthd->bhst", rotated(q), k) / np.sqrt(np.float32(config.head_dim)) + future
        attended = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, axis=-1), v)
        x = x + jnp.einsum("bshd,ehd->bse", attended, weights.wo.array[layer])
        h = normed(x, weights.mlp_norm.array[layer])
        gate, up = (jnp.einsum("bse,me->bsm", h, w.array[layer]) for w in (weights.w_gate, weights.w_up))
        x = x + jnp.einsum("bsm,em->bse", jax.nn.silu(gate) * up, weights.w_down.array[layer])
    return jnp.einsum("bse,ve->bsv", normed(x, model.final_norm.array), model.embedding.array)


class PlainPairs(NamedTuple):
    """Pairs in the layout of most trainers; on the middle axis, 0 is the chosen answer and 1 the rejected one."""

    tokens: np.ndarray  # [pairs, 2, seq]
    is_answer: np.ndarray  # [pairs, 2, seq]


def plain_pairs(pairs: list[TokenizedPair]) -> PlainPairs:
    length = max(pair.longest for pair in pairs)
    tokens, is_answer = np.zeros((len(pairs), 2, length), np.int32), np.zeros((len(pairs), 2, length), np.float32)
    for index, pair in enumerate(pairs):
        sides = (pair.chosen_tokens, pair.chosen_response_start), (pair.rejected_tokens, pair.rejected_response_start)
        for side, (sequence, start) in enumerate(sides):
            tokens[index, side, : len(sequence)] = sequence
            is_answer[index, side, start : len(sequence)] = 1
    return PlainPairs(tokens, is_answer)


def plain_loss(model: Llama, config: LlamaConfig, pairs: PlainPairs, simpo: SimpoConfig) -> jax.Array:
    """Return the loss, computed with two separate forward passes over full logits."""

    def answers(side: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens, mask = pairs.tokens[:, side], jnp.asarray(pairs.is_answer[:, side, 1:])
        logits = plain_logits(model, config, jnp.asarray(tokens))[:, :-1]
        log_sums = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0] - log_sums
        return picked * mask, log_sums * mask, mask

    (chosen, chosen_sums, chosen_mask), (rejected, rejected_sums, rejected_mask) = answers(0), answers(1)
    margin = chosen.sum(1) / chosen_mask.sum(1) - rejected.sum(1) / rejected_mask.sum(1) - simpo.gamma_beta_ratio
    if simpo.loss_type == "hinge":
        losses = jnp.maximum(0, 1 - simpo.beta * margin)
    else:
        smoothing = simpo.label_smoothing
        right, wrong = jnp.logaddexp(0.0, -simpo.beta * margin), jnp.logaddexp(0.0, simpo.beta * margin)
        losses = (1 - smoothing) * right + smoothing * wrong
    sft = -chosen.sum() / chosen_mask.sum()
    z = ((chosen_sums**2).sum() + (rejected_sums**2).sum()) / (chosen_mask.sum() + rejected_mask.sum())
    return losses.mean() + simpo.sft_weight * sft + simpo.z_loss_weight * z


# Compiled once per config for all tests: on a busy machine, compiling dominates the time of these tests.
@functools.partial(jax.jit, static_argnames=("config", "simpo"))
def plain_loss_and_gradient(
    params: Llama, config: LlamaConfig, pairs: PlainPairs, simpo: SimpoConfig
) -> tuple[jax.Array, Llama]:
    return jax.value_and_grad(plain_loss)(params, config, pairs, simpo)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "slot_lens"))
def _ours(
    params: Llama, batch: BatchArrays, config: TrainerConfig, mesh: Mesh, slot_lens: tuple[int, ...]
) -> tuple[jax.Array, Llama]:
    metrics, gradient = loss_and_gradient(params, batch, config, fsdp_placement(mesh, jnp.float32, slot_lens))
    return metrics["loss"], gradient


@pytest.fixture
def ours(params: Llama, five_pairs: list[TokenizedPair], one_device: Mesh, make_loader):
    """Return a function that computes loss and gradient of the first update of a run."""

    def compute(config: TrainerConfig, pad_id: int = 0) -> tuple[jax.Array, Llama]:
        loader = make_loader(five_pairs, config, pad_id=pad_id)
        batch = place_batch(loader.batch(0), config, one_device)
        return _ours(params, batch, config, one_device, loader.shape.slot_lens)

    return compute


@pytest.fixture
def params(tiny_model: LlamaConfig, random_llama) -> Llama:
    return random_llama(tiny_model)


@pytest.fixture
def pairs(loader: PairLoader) -> PlainPairs:
    """Return the pairs of the first update."""
    return plain_pairs([loader.pairs[index] for index in loader.indices(0)])


def assert_equal_up_to_rounding(got: tuple[jax.Array, Llama], expected: tuple[jax.Array, Llama]) -> None:
    assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    assert_trees_close(got[1], expected[1], rtol=2e-5)


def assert_trees_close(got: Any, expected: Any, rtol: float) -> None:
    """Check equality up to `rtol` of each leaf's largest value."""
    for (path, expected_leaf), leaf in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        atol = rtol * float(np.abs(expected_leaf).max())
        np.testing.assert_allclose(leaf, expected_leaf, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


PLAIN, WITH_SFT = SimpoConfig(), SimpoConfig(sft_weight=0.7, z_loss_weight=0.01)


@pytest.mark.parametrize(
    ("packing", "simpo"),
    [
        (False, PLAIN),
        (True, WITH_SFT),
        pytest.param(True, PLAIN, marks=pytest.mark.slow),
        pytest.param(True, SimpoConfig(beta=1.5, gamma_beta_ratio=0.2, label_smoothing=0.1), marks=pytest.mark.slow),
        pytest.param(True, SimpoConfig(loss_type="hinge"), marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_equal_a_plain_reference(packing, simpo, params, tiny_model, tiny_run, pairs, ours):
    expected = plain_loss_and_gradient(params, tiny_model, pairs, simpo)
    assert_equal_up_to_rounding(ours(dataclasses.replace(tiny_run, packing=packing, simpo=simpo)), expected)


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradient_accumulation_equals_the_whole_batch(packing, tiny_run, ours):
    whole = dataclasses.replace(tiny_run, train_batch_size=4, packing=packing, simpo=WITH_SFT)
    assert_equal_up_to_rounding(ours(dataclasses.replace(whole, grad_accumulation=4)), ours(whole))


def test_an_answer_in_a_packed_row_is_as_likely_as_alone(params, tiny_run, five_pairs, one_device):
    config = dataclasses.replace(tiny_run, train_batch_size=5, packing=True)
    shape = packed_shape([five_pairs], 1)
    assert shape.slot_lens
    placement = fsdp_placement(one_device, jnp.float32, shape.slot_lens)
    batch = packed_rows(five_pairs, shape, 0)
    part = jax.tree.map(lambda array: array[0], place_batch(batch, config, one_device).parts)
    logps, _ = jax.jit(lambda params, part: answer_logps(params, part, config, placement))(params, part)
    plain = plain_pairs(five_pairs)
    logits = plain_logits(params, params.config, jnp.asarray(plain.tokens.reshape(10, -1)))
    alone = jax.nn.log_softmax(logits, axis=-1)
    for sequence in range(10):
        (at,) = np.nonzero(plain.is_answer.reshape(10, -1)[sequence])
        expected = [float(alone[sequence, place - 1, plain.tokens.reshape(10, -1)[sequence, place]]) for place in at]
        np.testing.assert_allclose(np.asarray(logps)[batch.sequences == sequence], expected, atol=2e-5)


def test_the_compiled_update_applies_that_gradient_and_reports_its_norm(
    params, tiny_model, tiny_run, loader, pairs, programs, one_device
):
    config = dataclasses.replace(tiny_run, optimizer=OptimizerConfig(max_grad_norm=1e6, beta1=0.5))
    _, expected = plain_loss_and_gradient(params, tiny_model, pairs, config.simpo)
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


@pytest.mark.parametrize(("chunk_size", "remat"), [(7, "full"), (1000, "none")])
def test_neither_chunks_of_the_vocabulary_nor_recomputed_layers_change_loss_or_gradient(
    chunk_size, remat, tiny_run, ours
):
    changed = dataclasses.replace(tiny_run, logprob_chunk_size=chunk_size, remat=remat)
    assert_equal_up_to_rounding(ours(changed), ours(tiny_run))


@pytest.mark.parametrize(("seq_len", "pad_id", "packing"), [(16, 39, False), (33, 5, False), (33, 5, True)])
def test_neither_length_nor_token_of_the_padding_changes_loss_or_gradient(seq_len, pad_id, packing, tiny_run, ours):
    longer = dataclasses.replace(tiny_run, train_seq_len=seq_len, packing=packing)
    assert_equal_up_to_rounding(ours(longer, pad_id), ours(tiny_run))


def test_bfloat16_compute_comes_close_and_keeps_a_float32_gradient(tiny_run, ours):
    loss, gradient = ours(tiny_run)
    half_loss, half_gradient = ours(dataclasses.replace(tiny_run, compute_dtype="bfloat16"))
    assert float(half_loss) == pytest.approx(float(loss), rel=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_gradient)} == {jnp.dtype(jnp.float32)}
    assert_trees_close(half_gradient, gradient, rtol=0.1)


def test_an_update_donates_its_input_state(tiny_model, tiny_run, loader, programs, one_device):
    trainer = Trainer.start_random(tiny_run, tiny_model, programs=programs, mesh=one_device)
    before = jax.tree.leaves(trainer.params)
    trainer.train_until(1, loader, lambda step, metrics: None)
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(trainer.state))
