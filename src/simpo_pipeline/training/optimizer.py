"""AdamW and its learning rate, from optax.

    learning rate of update n (0-based); W warm-up updates, N = num_train_steps of the WHOLE run, r = min_lr_ratio
        n <  W     peak * n / W
        n >= W     peak * (r + (1 - r) * decay((n - W) / (N - W)))    cosine and linear fall from 1 to 0; constant: 1
        wsd        peak, and in the last D updates    peak * (r + (1 - r) * (N - n) / D)

as in Hugging Face's and Levanter's schedules. The rate is a function of optax's own update count, so updates 3..7 get
the same rates as in a run that does not stop after update 2. `learning_rate_at` is the same function in numpy, for the
host's logs.

Weight decay is decoupled and skips norm weights, as in Hugging Face's trainers and Levanter: a parameter decays if
it has more than one axis, not counting the axis that stacks the layers. Parameters are trees of haliax NamedArrays;
this module knows nothing else about them.
"""

from typing import Any

import haliax as hax
import jax
import numpy as np
import optax
from haliax import NamedArray

from simpo_pipeline.training.config import OptimizerConfig

STACKING_AXIS = "layers"


def build_optimizer(config: OptimizerConfig, num_train_steps: int) -> optax.GradientTransformation:
    """Return clipping by global norm followed by AdamW, on the schedule of a run of `num_train_steps` updates."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate_schedule(config, num_train_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=weight_decay_mask,
            mu_dtype=config.moment_dtype,
        ),
    )


def apply_gradient(
    optimizer: optax.GradientTransformation, gradient: Any, opt_state: optax.OptState, params: Any
) -> tuple[Any, optax.OptState]:
    """Return (parameters, optimizer state) after one update; `gradient` and `params` are trees of equal structure."""
    # optax raises Python floats to the power of its int32 count, which strict promotion rejects.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def learning_rate_schedule(config: OptimizerConfig, num_train_steps: int) -> optax.Schedule:
    """Return the schedule that optax evaluates on the device, from its update count."""
    peak, warmup_steps = config.learning_rate, config.warmup_steps(num_train_steps)
    decay_steps = config.decay_steps(num_train_steps)
    if config.lr_schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.min_lr_ratio)
    elif config.lr_schedule == "constant" or not decay_steps:
        decay = optax.constant_schedule(peak)
    else:
        stable_steps = num_train_steps - warmup_steps - decay_steps
        decay = optax.linear_schedule(peak, peak * config.min_lr_ratio, decay_steps, transition_begin=stable_steps)
    if warmup_steps == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])


def learning_rate_at(config: OptimizerConfig, num_train_steps: int, step: int) -> float:
    """Return the learning rate of update `step` (0-based), computed on the host."""
    warmup_steps = config.warmup_steps(num_train_steps)
    if step < warmup_steps:
        return config.learning_rate * step / warmup_steps
    decay_steps = config.decay_steps(num_train_steps)
    if config.lr_schedule == "constant" or not decay_steps:
        return config.learning_rate
    progress = min(max(0, step - (num_train_steps - decay_steps)) / decay_steps, 1.0)
    remaining = float(0.5 * (1 + np.cos(np.pi * progress))) if config.lr_schedule == "cosine" else 1.0 - progress
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def weight_decay_mask(params: Any) -> Any:
    """Return a tree of bools: whether weight decay applies to each parameter."""

    def is_matrix(parameter: NamedArray) -> bool:
        return sum(axis.name != STACKING_AXIS for axis in parameter.axes) > 1

    return hax.tree_util.tree_map(is_matrix, params)
