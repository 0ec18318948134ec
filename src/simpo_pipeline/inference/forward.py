"""The two device programs of generation, as pure functions of arrays: prefill and decode.

Prefill only fills the cache: the last token of a prompt is left to decode, so that every token is drawn by the same
program, whether its sequence is new or was preempted.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from simpo_pipeline.inference.batches import DecodeBatch, PrefillBatch
from simpo_pipeline.inference.kv_cache import KVCache, TokenPlaces
from simpo_pipeline.inference.sampling import draw_tokens
from simpo_pipeline.model.transformer import Llama, logits, transform


def prefill(weights: Llama, cache: KVCache, batch: PrefillBatch, *, dtype: DTypeLike) -> KVCache:
    """The cache with the keys and values of the batch's tokens in it."""
    num_tokens = batch.tokens.shape[0]
    _, cache = _hidden(weights, cache, jnp.asarray(batch.tokens), batch.places, num_tokens, dtype)
    return cache


def decode(
    weights: Llama, cache: KVCache, batch: DecodeBatch, step: UInt32[Array, ""], *, max_steps: int, dtype: DTypeLike
) -> tuple[KVCache, Int[Array, "rows max_steps"]]:
    """Draws up to `num_steps` tokens a row, fewer when a stop token comes; ends when every row has.

    Returns the cache and the drawn tokens, the stop token included, -1 where a row had ended.
    """
    num_rows = batch.tokens.shape[0]
    rows = jnp.arange(num_rows, dtype=jnp.int32)

    def draw_one_each(state: _Decoding) -> _Decoding:
        positions = jnp.where(state.alive, batch.positions + state.num_done, -1)
        places = TokenPlaces(
            page_table=batch.page_table,
            query_starts=jnp.arange(num_rows + 1, dtype=jnp.int32),
            kv_lens=positions + 1,
            seqs=rows,
            positions=positions,
        )
        hidden, cache = _hidden(weights, state.cache, state.tokens, places, 1, dtype)
        tokens = draw_tokens(logits(weights, hidden).array, batch.sampling, step, positions + 1)
        stopped = jnp.any(tokens[:, None] == batch.stop_tokens, axis=-1)
        return _Decoding(
            cache=cache,
            tokens=tokens,
            alive=state.alive & ~stopped & (state.num_done + 1 < batch.num_steps),
            drawn=state.drawn.at[:, state.num_done].set(jnp.where(state.alive, tokens, -1)),
            num_done=state.num_done + 1,
        )

    start = _Decoding(
        cache=cache,
        tokens=jnp.asarray(batch.tokens),
        alive=jnp.asarray(batch.num_steps) > 0,
        drawn=jnp.full((num_rows, max_steps), -1, jnp.int32),
        num_done=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(lambda state: jnp.any(state.alive), draw_one_each, start)
    return end.cache, end.drawn


class _Decoding(NamedTuple):
    """What the decode loop carries."""

    cache: KVCache
    tokens: Int[Array, " rows"]  # to be fed next
    alive: Bool[Array, " rows"]
    drawn: Int[Array, "rows max_steps"]
    num_done: Int[Array, ""]


def _hidden(
    weights: Llama,
    cache: KVCache,
    tokens: Int[Array, " tokens"],
    places: TokenPlaces,
    max_queries_per_seq: int,
    dtype: DTypeLike,
) -> tuple[NamedArray, KVCache]:
    """Hidden states [token, embed] of a ragged batch, and the cache with its keys and values."""

    def attend(
        layer: Int[Array, ""],
        q: Float[Array, "tokens heads head_size"],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        cache: KVCache,
    ) -> tuple[Array, Any]:
        return cache.attend(layer, q, k, v, places, max_queries_per_seq=max_queries_per_seq)

    token = Axis("token", tokens.shape[0])
    positions = NamedArray(jnp.asarray(places.positions), (token,))
    return transform(weights, NamedArray(tokens, (token,)), positions, attend=attend, state=cache, dtype=dtype)
