"""The SimPO loss, as a pure function of log-probs.

Meng, Xia and Chen 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (arXiv 2405.14734):

    avg(y)  = mean over the tokens of response y of log p(token | everything before it)
    loss    = -log sigmoid(beta * ((avg(chosen) - avg(rejected)) - gamma_beta_ratio)), mean over the pairs

Conventions elsewhere, for who ports settings:

    here, princeton-nlp/SimPO, Levanter    `gamma_beta_ratio`, nats per token; princeton's README tunes it in 0..1
    the paper                              absolute `gamma = beta * gamma_beta_ratio`
    TRL (CPO trainer, loss_type simpo)     absolute `simpo_gamma = beta * gamma_beta_ratio`, with `cpo_alpha = 0`:
                                           its default of 1 adds an SFT loss that SimPO does not have
    Levanter's `simpo_accuracy`            counts margins above gamma_beta_ratio; ours, as TRL's, those above 0

The module knows no model and no tokens: whoever calls decides which positions are the response.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simpo_pipeline.training.config import SimpoConfig


def average_logps(
    token_logps: Float[Array, "*lead seq"], loss_mask: Float[Array, "*lead seq"]
) -> Float[Array, "*lead"]:
    """Mean log-prob of the tokens under the mask, per sequence, in nats.

    A sequence whose mask is empty averages to 0 (not NaN): it adds a constant to the loss and no gradient.
    """
    total = jnp.sum(token_logps * loss_mask, axis=-1)
    return total / jnp.maximum(jnp.sum(loss_mask, axis=-1), jnp.ones((), loss_mask.dtype))


def simpo_loss(
    chosen_logps: Float[Array, " pairs"], rejected_logps: Float[Array, " pairs"], config: SimpoConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss and the metrics that describe it, from the average log-probs of each pair.

    Metrics, each a mean over the pairs; a reward is `beta * avg(y)`, as in TRL:
        loss                  the loss itself
        rewards/chosen        reward of the chosen response
        rewards/rejected      reward of the rejected response
        rewards/margins       chosen reward minus rejected reward, before gamma is taken off
        rewards/accuracies    share of pairs whose chosen reward is above the rejected one
        logps/chosen          avg(chosen)
        logps/rejected        avg(rejected)
    """
    margins = chosen_logps - rejected_logps
    loss = jnp.mean(-jax.nn.log_sigmoid(config.beta * (margins - config.gamma_beta_ratio)))
    metrics = {
        "loss": loss,
        "rewards/chosen": config.beta * jnp.mean(chosen_logps),
        "rewards/rejected": config.beta * jnp.mean(rejected_logps),
        "rewards/margins": config.beta * jnp.mean(margins),
        "rewards/accuracies": jnp.mean((margins > 0).astype(margins.dtype)),
        "logps/chosen": jnp.mean(chosen_logps),
        "logps/rejected": jnp.mean(rejected_logps),
    }
    return loss, metrics
