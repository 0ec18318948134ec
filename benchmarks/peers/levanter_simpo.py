"""A SimPO update on Levanter's Llama as a process that trains, in float32 (see protocol.py).

Levanter has DPO but no SimPO. This uses its DPO's sum of log-probs over one forward pass of all sequences, with the
loss and optax's AdamW around it. There is no recomputation, because it is fastest without.
"""
# pyright: reportMissingImports=false
# It runs in its own environment.

import dataclasses
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.models.lm_model import LmExample
from levanter.trainer import TrainerConfig
from protocol import RECIPE, Pair, Update, serve_updates


def as_rows(pairs: list[Pair], batch: hax.Axis, position: hax.Axis) -> LmExample:
    """Return rows with the chosen answers in the first half; the weights mark the positions that predict answers."""
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    starts = [pair.start for pair in pairs] * 2
    tokens = np.zeros((batch.size, position.size), np.int32)
    weights = np.zeros((batch.size, position.size), np.float32)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[row, : len(ids)] = ids
        # The loss of a position is that of the next token.
        weights[row, start - 1 : len(ids) - 1] = 1
    return LmExample(hax.named(tokens, (batch, position)), hax.named(weights, (batch, position)))


def load(settings: dict[str, Any], pairs: list[Pair]) -> Update:
    path, longest = settings["model"], max(len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected))
    trainer = TrainerConfig()
    batch = hax.Axis("batch", 2 * len(pairs))
    with trainer.use_device_mesh():
        converter = LlamaConfig().hf_checkpoint_converter(path)
        config = dataclasses.replace(
            converter.config_from_hf_config(converter.default_hf_config), gradient_checkpointing=False
        )
        model = converter.load_pretrained(LlamaLMHeadModel, ref=path, config=config, dtype=jnp.float32)
        example = as_rows(pairs, batch, config.max_Pos.resize(longest))
        optimizer = optax.chain(
            optax.clip_by_global_norm(RECIPE.max_grad_norm),
            optax.adamw(
                RECIPE.learning_rate, b1=RECIPE.betas[0], b2=RECIPE.betas[1], eps=RECIPE.epsilon, weight_decay=0.0
            ),
        )
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_of(model: LlamaLMHeadModel, example: LmExample) -> jax.Array:
        nll = model.compute_next_token_loss(example, reduction=hax.sum, reduction_axis="position").array
        average = -nll / example.loss_weight.array.sum(axis=1)
        chosen, rejected = average[: len(pairs)], average[len(pairs) :]
        return -jax.nn.log_sigmoid(RECIPE.beta * (chosen - rejected - RECIPE.gamma_beta_ratio)).mean()

    @eqx.filter_jit(donate="all-except-first")
    def step(example: LmExample, model: LlamaLMHeadModel, state: optax.OptState) -> Any:
        loss, gradient = eqx.filter_value_and_grad(loss_of)(model, example)
        updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return loss, eqx.apply_updates(model, updates), state

    def update() -> float:
        nonlocal model, state
        with trainer.use_device_mesh():
            loss, model, state = step(example, model, state)
        return float(loss)

    return update


if __name__ == "__main__":
    serve_updates(("marin-levanter", "jax"), load)
