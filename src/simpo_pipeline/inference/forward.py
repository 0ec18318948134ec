"""The device programs of generation, as pure functions of arrays: prefill, decode, and both together.

Prefill only fills the cache: the last token of a prompt is left to decode, so that every token is drawn by the same
code, whether its sequence is new or was preempted.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from simpo_pipeline.inference.batches import DecodeBatch, PrefillBatch
from simpo_pipeline.inference.config import MAX_LOGPROBS
from simpo_pipeline.inference.kv_cache import KVCache, TokenPlaces
from simpo_pipeline.inference.logprobs import token_logprobs
from simpo_pipeline.inference.sampling import UNSPLIT, VocabSplit, draw_tokens
from simpo_pipeline.inference.seen_tokens import mark_seen
from simpo_pipeline.model.transformer import (
    AnyLlama,
    Llama,
    LlamaLayers,
    MergedLayers,
    Placement,
    UnstackedLlama,
    logits,
    merged,
    merged_layers,
    transform,
    unstacked,
)


class Drawn(NamedTuple):
    """What the rows of a decode round drew, step by step; the stop token is included, -1 where a row had ended.

    Log-probabilities are zeros where no row wants any.
    """

    tokens: Int[Array, "rows max_steps"]
    chosen: Float[Array, "rows max_steps"]
    top_ids: Int[Array, "rows max_steps max_logprobs"]
    top_logprobs: Float[Array, "rows max_steps max_logprobs"]


def lay_out(layers: LlamaLayers) -> tuple[LlamaLayers | None, tuple[LlamaLayers, ...]]:
    """The layers' parameters as XLA's CPU backend runs them fast: for programs over chunks, and for decode.

    The former stay a stack, None where it may stay as it is: of a stack of bfloat16 XLA makes float32 in every pass, so
    they get its bits. Decode has so few rows that even the copy of each layer's part out of the stack counts.
    """
    if layers.wq.dtype != jnp.bfloat16:
        return None, unstacked(layers)
    return jax.tree.map(_as_bits, layers, is_leaf=lambda leaf: isinstance(leaf, NamedArray)), unstacked(layers)


def lay_out_by_layer(
    layers: LlamaLayers, parts: int | None
) -> tuple[None, tuple[LlamaLayers, ...] | tuple[MergedLayers, ...]]:
    """The same for XLA's GPU backend, merged where heads lie in so many equal parts over devices.

    It copies each layer's part out of a stack before it multiplies. In programs over chunks, which multiply for longer
    than it copies, the stack stays as it is.
    """
    return None, unstacked(layers) if parts is None else unstacked(merged_layers(layers, parts))


def prefill(weights: Llama | UnstackedLlama, cache: KVCache, batch: PrefillBatch, *, dtype: DTypeLike) -> KVCache:
    """The cache with the keys and values of the batch's tokens in it."""
    _, cache = _hidden(weights, cache, jnp.asarray(batch.tokens), _prefill_places(batch, cache), dtype)
    return cache


def prefill_and_decode(
    weights: Llama | UnstackedLlama,
    cache: KVCache,
    chunks: PrefillBatch,
    batch: DecodeBatch,
    step: UInt32[Array, ""],
    *,
    dtype: DTypeLike,
    split: VocabSplit = UNSPLIT,
) -> tuple[KVCache, Drawn]:
    """The cache with the keys and values of `chunks` in it, and one token for each row of `batch`, in one forward."""
    num_rows = batch.tokens.shape[0]
    state = _first_state(cache, batch, max_steps=1)
    places = _joined(_decode_places(batch, state), _prefill_places(chunks, cache))
    tokens = jnp.concatenate([state.tokens, jnp.asarray(chunks.tokens)])
    hidden, cache = _hidden(weights, cache, tokens, places, dtype)
    own = NamedArray(hidden.array[:num_rows], (Axis("token", num_rows), hidden.axes[1]))
    end = _after_draw(weights, batch, step, state._replace(cache=cache), own, split)
    return end.cache, end.drawn


def decode(
    weights: Llama | UnstackedLlama,
    cache: KVCache,
    batch: DecodeBatch,
    step: UInt32[Array, ""],
    *,
    max_steps: int,
    dtype: DTypeLike,
    split: VocabSplit = UNSPLIT,
    head_parts: int = 1,
) -> tuple[KVCache, Drawn]:
    """Draws up to `num_steps` tokens a row, fewer when a stop token comes; `head_parts` as in `transformer.merged`.

    Ends when no row may draw any more, and already when `num_ended` of them have ended.
    """
    params = merged(weights, head_parts) if isinstance(weights, Llama) else weights

    def draw_one_each(state: _Decoding) -> _Decoding:
        hidden, cache = _hidden(params, state.cache, state.tokens, _decode_places(batch, state), dtype)
        return _after_draw(params, batch, step, state._replace(cache=cache), hidden, split)

    def goes_on(state: _Decoding) -> Bool[Array, ""]:
        may_draw = jnp.asarray(batch.num_steps) > 0
        num_ended = jnp.sum(may_draw & ~state.alive, dtype=jnp.int32)
        return jnp.any(state.alive) & (num_ended < batch.num_ended)

    end = lax.while_loop(goes_on, draw_one_each, _first_state(cache, batch, max_steps))
    return end.cache, end.drawn


class _Decoding(NamedTuple):
    """What the decode loop carries."""

    cache: KVCache
    tokens: Int[Array, " rows"]  # to be fed next
    alive: Bool[Array, " rows"]
    seen: UInt32[Array, "rows words"]
    drawn: Drawn
    num_done: Int[Array, ""]


def _first_state(cache: KVCache, batch: DecodeBatch, max_steps: int) -> _Decoding:
    num_rows = batch.tokens.shape[0]
    return _Decoding(
        cache=cache,
        tokens=jnp.asarray(batch.tokens),
        alive=jnp.asarray(batch.num_steps) > 0,
        seen=jnp.asarray(batch.seen),
        drawn=Drawn(
            tokens=jnp.full((num_rows, max_steps), -1, jnp.int32),
            chosen=jnp.zeros((num_rows, max_steps), jnp.float32),
            top_ids=jnp.zeros((num_rows, max_steps, MAX_LOGPROBS), jnp.int32),
            top_logprobs=jnp.zeros((num_rows, max_steps, MAX_LOGPROBS), jnp.float32),
        ),
        num_done=jnp.zeros((), jnp.int32),
    )


def _after_draw(
    weights: AnyLlama,
    batch: DecodeBatch,
    step: UInt32[Array, ""],
    state: _Decoding,
    hidden: NamedArray,
    split: VocabSplit,
) -> _Decoding:
    """The state after each living row has drawn a token from its hidden state [token, embed]."""
    out = logits(weights, hidden).array
    positions = _positions(batch, state)
    tokens = draw_tokens(out, batch.sampling, step, positions + 1, state.seen, split)
    chosen, top_ids, top_logprobs = token_logprobs(out, tokens, batch.sampling)
    at = state.num_done
    stopped = jnp.any(tokens[:, None] == batch.sampling.stop_tokens, axis=-1)
    return _Decoding(
        cache=state.cache,
        tokens=tokens,
        alive=state.alive & ~stopped & (at + 1 < batch.num_steps),
        seen=mark_seen(state.seen, tokens, state.alive),
        drawn=Drawn(
            tokens=state.drawn.tokens.at[:, at].set(jnp.where(state.alive, tokens, -1)),
            chosen=state.drawn.chosen.at[:, at].set(chosen),
            top_ids=state.drawn.top_ids.at[:, at].set(top_ids),
            top_logprobs=state.drawn.top_logprobs.at[:, at].set(top_logprobs),
        ),
        num_done=at + 1,
    )


def _positions(batch: DecodeBatch, state: _Decoding) -> Int[Array, " rows"]:
    return jnp.where(state.alive, batch.positions + state.num_done, -1)


def _decode_places(batch: DecodeBatch, state: _Decoding) -> TokenPlaces:
    num_rows = batch.tokens.shape[0]
    positions = _positions(batch, state)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return TokenPlaces(
        page_table=batch.page_table,
        query_starts=jnp.arange(num_rows + 1, dtype=jnp.int32),
        kv_lens=positions + 1,
        pages=_pages(batch.page_table, rows, positions, state.cache),
        positions=positions,
        num_single=num_rows,
    )


def _prefill_places(batch: PrefillBatch, cache: KVCache) -> TokenPlaces:
    return TokenPlaces(
        page_table=batch.page_table,
        query_starts=batch.query_starts,
        kv_lens=batch.kv_lens,
        pages=_pages(batch.page_table, batch.seqs, batch.positions, cache),
        positions=batch.positions,
        num_single=0,
    )


def _pages(page_table: Any, seqs: Any, positions: Any, cache: KVCache) -> Int[Array, " tokens"]:
    """The page that each token's keys and values go into; any for a place that holds no token."""
    return jnp.asarray(page_table)[jnp.asarray(seqs), jnp.asarray(positions) // cache.page_size]


def _joined(single: TokenPlaces, chunks: TokenPlaces) -> TokenPlaces:
    num_single = single.num_single
    return TokenPlaces(
        page_table=jnp.concatenate([single.page_table, chunks.page_table]),
        query_starts=jnp.concatenate([single.query_starts[:-1], num_single + jnp.asarray(chunks.query_starts)]),
        kv_lens=jnp.concatenate([single.kv_lens, chunks.kv_lens]),
        pages=jnp.concatenate([single.pages, chunks.pages]),
        positions=jnp.concatenate([single.positions, chunks.positions]),
        num_single=num_single,
    )


def _hidden(
    weights: AnyLlama,
    cache: KVCache,
    tokens: Int[Array, " tokens"],
    places: TokenPlaces,
    dtype: DTypeLike,
) -> tuple[NamedArray, KVCache]:
    """Hidden states [token, embed] of a batch, and the cache with its keys and values."""

    def attend(
        layer: Int[Array, ""],
        q: Float[Array, "tokens heads head_size"],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        cache: KVCache,
    ) -> tuple[Array, Any]:
        return cache.attend(layer, q, k, v, places)

    token = Axis("token", tokens.shape[0])
    positions = NamedArray(jnp.asarray(places.positions), (token,))
    return transform(
        weights,
        NamedArray(tokens, (token,)),
        positions,
        attend=attend,
        state=cache,
        dtype=dtype,
        placement=Placement(weight=_as_numbers, hidden=lambda hidden: hidden),
    )


def _as_bits(weight: NamedArray) -> NamedArray:
    return NamedArray(lax.bitcast_convert_type(weight.array, jnp.uint16), weight.axes)


def _as_numbers(weight: NamedArray) -> NamedArray:
    if weight.dtype != jnp.uint16:
        return weight
    return NamedArray(lax.bitcast_convert_type(weight.array, jnp.bfloat16), weight.axes)
