"""The SimPO loss, as a pure function of log-probs.

Meng, Xia and Chen 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward" (arXiv 2405.14734):

    avg(y)   = mean over the tokens of response y of log p(token | everything before it)
    x        = beta * ((avg(chosen) - avg(rejected)) - gamma_beta_ratio)
    sigmoid    -log sigmoid(x); with label smoothing s (Mitchell 2023) -(1 - s) * log sigmoid(x) - s * log sigmoid(-x)
    hinge      max(0, 1 - x)
    loss     = mean over the pairs  +  sft_weight * sft  +  z_loss_weight * z
    sft      = mean over the chosen answers' tokens of -log p(token | ...)     (CPO, Xu et al. 2024, arXiv 2401.08417)
    z        = mean over all answers' tokens of log(sum of exp(logits))^2      (PaLM, arXiv 2204.02311, section 5)

Conventions of other projects, for porting settings:

    here, princeton-nlp/SimPO, Levanter    `gamma_beta_ratio`, nats per token; princeton's README tunes it in 0..1
    the paper                              absolute `gamma = beta * gamma_beta_ratio`
    TRL (CPO trainer, loss_type simpo)     absolute `simpo_gamma = beta * gamma_beta_ratio`, with `cpo_alpha = 0`:
                                           its default of 1 adds an SFT loss that SimPO does not have
    TRL's loss_type "hinge"                uses summed, not average, log-probs and no gamma; princeton's is like ours
    TRL's `label_smoothing`                like ours, for its loss_type simpo; its default is 0 too
    princeton's `sft_weight`, TRL's `cpo_alpha`    our `sft_weight`; with gradient accumulation, both use the mean over
                                           each part's tokens, ours over the whole batch's
    Levanter's `simpo_accuracy`            counts margins above gamma_beta_ratio; ours, like TRL's, counts those above 0

This module does not know models or tokens: the caller decides which positions belong to the response.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simpo_pipeline.training.config import SimpoConfig


def simpo_loss(
    chosen_logps: Float[Array, " pairs"],
    rejected_logps: Float[Array, " pairs"],
    config: SimpoConfig,
    weights: Float[Array, " pairs"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the loss without its terms over tokens, and its metrics, from the average log-probs of pairs.

    All values are sums over the pairs, weighted by `weights`; for a mean, each weight is 1 / number of pairs. A reward
    is `beta * avg(y)`, as in TRL. Metrics:
        rewards/chosen        reward of the chosen response
        rewards/rejected      reward of the rejected response
        rewards/margins       chosen reward minus rejected reward, before gamma is subtracted
        rewards/accuracies    share of pairs whose chosen reward is above the rejected one
        logps/chosen          avg(chosen)
        logps/rejected        avg(rejected)
    """

    def mean(values: Float[Array, " pairs"]) -> Float[Array, ""]:
        return jnp.sum(weights * values)

    margins = chosen_logps - rejected_logps
    loss = mean(_pair_losses(config.beta * (margins - config.gamma_beta_ratio), config))
    metrics = {
        "rewards/chosen": config.beta * mean(chosen_logps),
        "rewards/rejected": config.beta * mean(rejected_logps),
        "rewards/margins": config.beta * mean(margins),
        "rewards/accuracies": mean((margins > 0).astype(margins.dtype)),
        "logps/chosen": mean(chosen_logps),
        "logps/rejected": mean(rejected_logps),
    }
    return loss, metrics


def _pair_losses(x: Float[Array, " pairs"], config: SimpoConfig) -> Float[Array, " pairs"]:
    if config.loss_type == "hinge":
        return jnp.maximum(1 - x, 0)
    if not config.label_smoothing:
        return -jax.nn.log_sigmoid(x)
    smoothing = config.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(x) - smoothing * jax.nn.log_sigmoid(-x)
