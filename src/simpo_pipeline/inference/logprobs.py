"""Log-probabilities of drawn tokens and of the likeliest ones, inside a device program."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from simpo_pipeline.inference.config import MAX_LOGPROBS
from simpo_pipeline.inference.sampling import SamplingRows

_Alternatives = tuple[Int[Array, "rows max_logprobs"], Float[Array, "rows max_logprobs"]]


def token_logprobs(
    logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"], sampling: SamplingRows
) -> tuple[Float[Array, " rows"], Int[Array, "rows max_logprobs"], Float[Array, "rows max_logprobs"]]:
    """Natural log-probabilities under softmax(logits): each row's token's, and those of its likeliest tokens.

    Returns the token's (fp32), the ids of the `MAX_LOGPROBS` likeliest tokens (int32; the likeliest first, the lower
    of equals first, -0 after 0) and theirs (fp32). All are 0 when no row has `logprobs` at 0 or more, the alternatives
    also when none has it above 0; else every row is filled. Past the last token of a small vocabulary ids are -1 and
    log-probabilities -inf.
    """
    wanted = jnp.asarray(sampling.logprobs)
    num_rows = logits.shape[0]

    def none() -> _Alternatives:
        return jnp.zeros((num_rows, MAX_LOGPROBS), jnp.int32), jnp.zeros((num_rows, MAX_LOGPROBS), jnp.float32)

    def computed() -> tuple[Float[Array, " rows"], _Alternatives]:
        log_total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_total
        return chosen, lax.cond(jnp.any(wanted > 0), lambda: _alternatives(logits, log_total), none)

    chosen, (top_ids, top) = lax.cond(
        jnp.any(wanted >= 0), computed, lambda: (jnp.zeros(num_rows, jnp.float32), none())
    )
    return chosen, top_ids, top


def _alternatives(logits: Float[Array, "rows vocab"], log_total: Float[Array, " rows"]) -> _Alternatives:
    num_top = min(MAX_LOGPROBS, logits.shape[1])
    top, ids = lax.top_k(logits, num_top)
    missing = ((0, 0), (0, MAX_LOGPROBS - num_top))
    return (
        jnp.pad(ids, missing, constant_values=-1),
        jnp.pad(top - log_total[:, None], missing, constant_values=-jnp.inf),
    )
