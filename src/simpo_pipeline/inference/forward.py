"""The device programs of generation as pure functions of arrays: prefill, decode, and both combined.

Prefill only fills the cache. Decode processes the last token of a prompt, so that the same code samples every token,
whether its sequence is new or was preempted.
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
from simpo_pipeline.inference.kv_cache import KVCache, TokenLocations
from simpo_pipeline.inference.logit_adjustments import counted, first_counts
from simpo_pipeline.inference.logprobs import token_logprobs
from simpo_pipeline.inference.sampling import UNSPLIT, VocabSplit, are_finite, draw_tokens
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
from simpo_pipeline.ops.paged_batch import PagedSequences

# Stands for the token of a row whose logits are not finite, which no token can be sampled from. It ends the row.
NOT_FINITE = -2


class SampledTokens(NamedTuple):
    """Tokens that the rows of a decode round sampled at each step, including stop tokens; -1 after a row has finished.

    `NOT_FINITE` stands for the token of a row whose logits are not finite. Log-probabilities are zeros if no row
    requests them.
    """

    tokens: Int[Array, "rows max_steps"]
    chosen: Float[Array, "rows max_steps"]
    top_ids: Int[Array, "rows max_steps max_logprobs"]
    top_logprobs: Float[Array, "rows max_steps max_logprobs"]


def lay_out(layers: LlamaLayers) -> tuple[LlamaLayers | None, tuple[LlamaLayers, ...]]:
    """Return the layers' parameters in the fastest layouts for XLA's CPU backend.

    Returns:
        The stacked layers for programs with prefill chunks, and the unstacked layers for decode. The stack is None if
        it needs no conversion. XLA would convert a bfloat16 stack to float32 in every pass, so a bfloat16 stack is
        returned as its bits. Decode has so few rows that even copying each layer out of the stack is significant.
    """
    if layers.wq.dtype != jnp.bfloat16:
        return None, unstacked(layers)
    return jax.tree.map(_as_bits, layers, is_leaf=lambda leaf: isinstance(leaf, NamedArray)), unstacked(layers)


def lay_out_by_layer(
    layers: LlamaLayers, parts: int | None
) -> tuple[None, tuple[LlamaLayers, ...] | tuple[MergedLayers, ...]]:
    """Return the layers' parameters in the fastest layouts for XLA's GPU backend, as `lay_out` does.

    XLA's GPU backend copies each layer out of a stack before its matmuls. In programs with prefill chunks the matmuls
    take longer than the copies, so the stack is not converted. The layers for decode are also merged (`merged_layers`)
    if the heads are sharded evenly into `parts` parts; `parts` is None if they are not.
    """
    return None, unstacked(layers) if parts is None else unstacked(merged_layers(layers, parts))


def prefill(weights: Llama | UnstackedLlama, cache: KVCache, batch: PrefillBatch, *, dtype: DTypeLike) -> KVCache:
    """Return the cache with the keys and values of the batch's tokens added."""
    _, cache = _hidden(weights, cache, jnp.asarray(batch.tokens), _prefill_locations(batch, cache), dtype)
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
) -> tuple[KVCache, SampledTokens]:
    """Add the keys and values of `chunks` to the cache and sample one token per row of `batch`, in one forward pass."""
    num_rows = batch.tokens.shape[0]
    state = _first_state(cache, batch, weights.config.vocab_size, max_steps=1)
    locations = _joined(_decode_locations(batch, state), _prefill_locations(chunks, cache))
    tokens = jnp.concatenate([state.tokens, jnp.asarray(chunks.tokens)])
    hidden, cache = _hidden(weights, cache, tokens, locations, dtype)
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
) -> tuple[KVCache, SampledTokens]:
    """Sample up to `num_steps` tokens per row; a row finishes early at a stop token.

    The loop ends when `num_ended` rows have finished, or when every row has. `head_parts` is `parts` of
    `transformer.merged`.
    """
    params = merged(weights, head_parts) if isinstance(weights, Llama) else weights

    def decode_step(state: _Decoding) -> _Decoding:
        hidden, cache = _hidden(params, state.cache, state.tokens, _decode_locations(batch, state), dtype)
        return _after_draw(params, batch, step, state._replace(cache=cache), hidden, split)

    def should_continue(state: _Decoding) -> Bool[Array, ""]:
        may_draw = jnp.asarray(batch.num_steps) > 0
        num_ended = jnp.sum(may_draw & ~state.alive, dtype=jnp.int32)
        return jnp.any(state.alive) & (num_ended < batch.num_ended)

    first = _first_state(cache, batch, weights.config.vocab_size, max_steps)
    end = lax.while_loop(should_continue, decode_step, first)
    return end.cache, end.drawn


class _Decoding(NamedTuple):
    """Loop state of decode."""

    cache: KVCache
    tokens: Int[Array, " rows"]  # the next input tokens
    alive: Bool[Array, " rows"]
    seen: UInt32[Array, "rows words"]
    counts: Int[Array, "rows vocab"] | None  # of generated tokens; None in programs without adjustments
    drawn: SampledTokens
    num_done: Int[Array, ""]


def _first_state(cache: KVCache, batch: DecodeBatch, vocab_size: int, max_steps: int) -> _Decoding:
    num_rows = batch.tokens.shape[0]
    adjustments = batch.sampling.adjustments
    return _Decoding(
        cache=cache,
        tokens=jnp.asarray(batch.tokens),
        alive=jnp.asarray(batch.num_steps) > 0,
        seen=jnp.asarray(batch.seen),
        counts=None if adjustments is None else first_counts(adjustments, vocab_size),
        drawn=SampledTokens(
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
    """Return the state after each active row has sampled a token from its hidden state [token, embed]."""
    out = logits(weights, hidden).array
    positions = _positions(batch, state)
    tokens = draw_tokens(out, batch.sampling, step, positions + 1, state.seen, split, state.counts)
    chosen, top_ids, top_logprobs = token_logprobs(out, tokens, batch.sampling)
    at = state.num_done
    stopped = jnp.any(tokens[:, None] == batch.sampling.stop_tokens, axis=-1)
    # Before penalties and bans, which may set logits to -inf.
    finite = are_finite(out, state.alive)
    return _Decoding(
        cache=state.cache,
        tokens=tokens,
        alive=state.alive & finite & ~stopped & (at + 1 < batch.num_steps),
        seen=mark_seen(state.seen, tokens, state.alive),
        counts=None if state.counts is None else counted(state.counts, tokens, state.alive),
        drawn=SampledTokens(
            tokens=state.drawn.tokens.at[:, at].set(jnp.where(state.alive, jnp.where(finite, tokens, NOT_FINITE), -1)),
            chosen=state.drawn.chosen.at[:, at].set(chosen),
            top_ids=state.drawn.top_ids.at[:, at].set(top_ids),
            top_logprobs=state.drawn.top_logprobs.at[:, at].set(top_logprobs),
        ),
        num_done=at + 1,
    )


def _positions(batch: DecodeBatch, state: _Decoding) -> Int[Array, " rows"]:
    return jnp.where(state.alive, batch.positions + state.num_done, -1)


def _decode_locations(batch: DecodeBatch, state: _Decoding) -> TokenLocations:
    num_rows = batch.tokens.shape[0]
    positions = _positions(batch, state)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    sequences = PagedSequences(
        page_table=jnp.asarray(batch.page_table),
        query_starts=jnp.arange(num_rows + 1, dtype=jnp.int32),
        kv_lens=positions + 1,
        num_single=num_rows,
    )
    return TokenLocations(sequences, _pages(batch.page_table, rows, positions, state.cache), positions)


def _prefill_locations(batch: PrefillBatch, cache: KVCache) -> TokenLocations:
    sequences = PagedSequences(
        page_table=jnp.asarray(batch.page_table),
        query_starts=jnp.asarray(batch.query_starts),
        kv_lens=jnp.asarray(batch.kv_lens),
        num_single=0,
    )
    pages = _pages(batch.page_table, batch.seqs, batch.positions, cache)
    return TokenLocations(sequences, pages, jnp.asarray(batch.positions))


def _pages(page_table: Any, seqs: Any, positions: Any, cache: KVCache) -> Int[Array, " tokens"]:
    """Return the page for each token's keys and values; an arbitrary page for padding."""
    return jnp.asarray(page_table)[jnp.asarray(seqs), jnp.asarray(positions) // cache.page_size]


def _joined(single: TokenLocations, chunks: TokenLocations) -> TokenLocations:
    first, rest = single.sequences, chunks.sequences
    sequences = PagedSequences(
        page_table=jnp.concatenate([first.page_table, rest.page_table]),
        query_starts=jnp.concatenate([first.query_starts[:-1], first.num_single + rest.query_starts]),
        kv_lens=jnp.concatenate([first.kv_lens, rest.kv_lens]),
        num_single=first.num_single,
    )
    return TokenLocations(
        sequences,
        pages=jnp.concatenate([single.pages, chunks.pages]),
        positions=jnp.concatenate([single.positions, chunks.positions]),
    )


def _hidden(
    weights: AnyLlama,
    cache: KVCache,
    tokens: Int[Array, " tokens"],
    locations: TokenLocations,
    dtype: DTypeLike,
) -> tuple[NamedArray, KVCache]:
    """Return the hidden states [token, embed] of a batch and the cache with its keys and values added."""
    token = Axis("token", tokens.shape[0])
    return transform(
        weights,
        NamedArray(tokens, (token,)),
        NamedArray(locations.positions, (token,)),
        attend=lambda layer, q, k, v, cache: cache.attend(layer, q, k, v, locations),
        state=cache,
        dtype=dtype,
        placement=Placement(weight=_from_bits, hidden=lambda hidden: hidden),
    )


def _as_bits(weight: NamedArray) -> NamedArray:
    return NamedArray(lax.bitcast_convert_type(weight.array, jnp.uint16), weight.axes)


def _from_bits(weight: NamedArray) -> NamedArray:
    if weight.dtype != jnp.uint16:
        return weight
    return NamedArray(lax.bitcast_convert_type(weight.array, jnp.bfloat16), weight.axes)
