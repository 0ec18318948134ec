"""Log-probabilities of sampled tokens and of the most likely tokens, inside a device program."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from simpo_pipeline.inference.config import MAX_LOGPROBS
from simpo_pipeline.inference.sampling import SamplingRows

_TopTokens = tuple[Int[Array, "rows max_logprobs"], Float[Array, "rows max_logprobs"]]


def token_logprobs(
    logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"], sampling: SamplingRows
) -> tuple[Float[Array, " rows"], Int[Array, "rows max_logprobs"], Float[Array, "rows max_logprobs"]]:
    """Return natural log-probabilities under softmax(logits) of each row's token and of its most likely tokens.

    Returns:
        The log-probability of each row's token (fp32), and the ids (int32) and log-probabilities (fp32) of the
        `MAX_LOGPROBS` most likely tokens. These are in decreasing order of likelihood; ties are in the order of token
        ids, but a logit of -0 comes after 0. All values are 0 if every row's `logprobs` is negative. The most likely
        tokens' values are also 0 if no row's `logprobs` is positive. Otherwise every row is filled. If the vocabulary
        is smaller than `MAX_LOGPROBS`, the remaining ids are -1 and their log-probabilities -inf.
    """
    num_tops = jnp.asarray(sampling.logprobs)
    num_rows = logits.shape[0]

    def none() -> _TopTokens:
        return jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32), jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32)

    def computed() -> tuple[Float[Array, " rows"], _TopTokens]:
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_total
        return chosen, lax.cond(jnp.any(num_tops > 0), lambda: _top_tokens(logits, log_total), none)

    chosen, (top_ids, top) = lax.cond(
        jnp.any(num_tops >= 0), computed, lambda: (jnp.zeros(num_rows, jnp.float32), none())
    )
    return chosen, top_ids, top


def _top_tokens(logits: Float[Array, "rows vocab"], log_total: Float[Array, " rows"]) -> _TopTokens:
    num_top = min(MAX_LOGPROBS, logits.shape[1])
    top, ids = lax.top_k(logits, num_top)
    missing = ((0, 0), (0, MAX_LOGPROBS - num_top))
    return (
        jnp.pad(ids, missing, constant_values=-1),
        jnp.pad(top - log_total[:, None], missing, constant_values=-jnp.inf),
    )
