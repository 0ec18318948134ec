"""The schedule on host and device, and which parameters decay."""

import dataclasses

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from haliax import Axis, NamedArray

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.training.config import OptimizerConfig
from simpo_pipeline.training.optimizer import (
    apply_gradient,
    build_optimizer,
    learning_rate_at,
    learning_rate_schedule,
    weight_decay_mask,
)

NUM_TRAIN_STEPS = 10


@pytest.mark.parametrize("lr_schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 4.0])
@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1, 1.0])
def test_the_hosts_learning_rate_equals_the_devices(lr_schedule, warmup, min_lr_ratio):
    config = OptimizerConfig(learning_rate=3e-4, warmup=warmup, lr_schedule=lr_schedule, min_lr_ratio=min_lr_ratio)
    with jax.numpy_dtype_promotion("standard"):
        counts = np.arange(NUM_TRAIN_STEPS, dtype=np.int32)
        on_device = jax.vmap(learning_rate_schedule(config, NUM_TRAIN_STEPS))(counts)
    on_host = [learning_rate_at(config, NUM_TRAIN_STEPS, step) for step in range(NUM_TRAIN_STEPS)]
    np.testing.assert_allclose(np.broadcast_to(on_device, len(counts)), on_host, rtol=1e-5, atol=1e-10)


def test_the_rate_rises_from_zero_to_the_peak_and_falls_towards_its_floor():
    config = OptimizerConfig(learning_rate=1.0, warmup=2.0, lr_schedule="linear", min_lr_ratio=0.2)
    rates = [learning_rate_at(config, 6, step) for step in range(7)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_wsd_stays_at_the_peak_until_its_last_updates():
    config = OptimizerConfig(learning_rate=1.0, warmup=2.0, lr_schedule="wsd", decay=0.5, min_lr_ratio=0.2)
    rates = [learning_rate_at(config, 8, step) for step in range(9)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def one_update(config: OptimizerConfig, params: dict, gradient: dict) -> dict[str, np.ndarray]:
    """Return the change of each parameter in the first update."""
    optimizer = build_optimizer(config, NUM_TRAIN_STEPS)
    updated, _ = apply_gradient(optimizer, gradient, optimizer.init(params), params)
    return {name: np.asarray(updated[name].array) - np.asarray(params[name].array) for name in params}


def named(values: list, *names: str) -> NamedArray:
    array = jnp.asarray(values, jnp.float32)
    return NamedArray(array, tuple(Axis(name, size) for name, size in zip(names, array.shape, strict=True)))


def test_the_first_update_is_clipped_adamw_with_decay_on_matrices_only():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0, lr_schedule="constant", epsilon=0.5)
    params = {"w": named([[2.0, -4.0]], "mlp", "embed"), "norm": named([1.0, 3.0], "embed")}
    gradient = {"w": named([[3.0, 0.0]], "mlp", "embed"), "norm": named([0.0, -4.0], "embed")}
    updates = one_update(config, params, gradient)
    # The gradient's norm is 5, so it is scaled by 1/5; after bias correction Adam's first direction is g / (|g| + eps).
    w, norm = np.array([[0.6, 0.0]]), np.array([0.0, -0.8])
    np.testing.assert_allclose(updates["w"], -0.1 * (w / (abs(w) + 0.5) + 0.5 * np.array([[2.0, -4.0]])), rtol=1e-5)
    np.testing.assert_allclose(updates["norm"], -0.1 * norm / (abs(norm) + 0.5), rtol=1e-5)


def test_a_gradient_below_the_limit_is_not_clipped():
    config = OptimizerConfig(learning_rate=1.0, warmup=0.0, lr_schedule="constant", epsilon=1.0, max_grad_norm=10.0)
    updates = one_update(config, {"w": named([[0.0]], "a", "b")}, {"w": named([[3.0]], "a", "b")})
    np.testing.assert_allclose(updates["w"], [[-3.0 / 4.0]], rtol=1e-6)


def test_only_norm_weights_are_exempt_from_decay(tiny_model):
    untied = dataclasses.replace(tiny_model, tie_word_embeddings=False)
    mask = weight_decay_mask(abstract_llama(untied, jnp.float32))
    assert (mask.embedding, mask.head, mask.final_norm) == (True, True, False)
    assert {name for name, decays in vars(mask.layers).items() if not decays} == {"attn_norm", "mlp_norm"}


def test_moments_are_float32_and_shaped_as_the_parameters(tiny_model: LlamaConfig):
    params = abstract_llama(tiny_model, jnp.float32)
    state = jax.eval_shape(build_optimizer(OptimizerConfig(), NUM_TRAIN_STEPS).init, params)
    (adam,) = (part for part in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(part))
    for moments in (adam.mu, adam.nu):
        assert hax.tree_util.tree_structure(moments) == hax.tree_util.tree_structure(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(jnp.float32)}


def test_only_the_first_moment_is_bfloat16_if_requested(tiny_model: LlamaConfig):
    optimizer = build_optimizer(OptimizerConfig(moment_dtype="bfloat16"), NUM_TRAIN_STEPS)
    state = jax.eval_shape(optimizer.init, abstract_llama(tiny_model, jnp.float32))
    (adam,) = (part for part in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(part))
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype(jnp.float32)}


def _is_adam(part: object) -> bool:
    return isinstance(part, optax.ScaleByAdamState)
