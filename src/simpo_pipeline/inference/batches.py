"""Rounds of the scheduler as arrays of fixed shapes, built in numpy: what the device programs take."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int

from simpo_pipeline.inference.config import MAX_STOP_TOKENS, EngineConfig
from simpo_pipeline.inference.kv_cache import TokenPlaces
from simpo_pipeline.inference.sampling import SamplingRows
from simpo_pipeline.inference.scheduler import DecodeRound, PrefillRound


class PrefillBatch(eqx.Module):
    """Prompt tokens of several sequences, end to end."""

    tokens: Int[Array | np.ndarray, " tokens"]
    places: TokenPlaces


class DecodeBatch(eqx.Module):
    """Sequences that draw tokens, one a row; rows past the last sequence draw none."""

    tokens: Int[Array | np.ndarray, " rows"]  # the last token of each sequence, not yet in the cache
    positions: Int[Array | np.ndarray, " rows"]  # of that token; -1 for a row without a sequence
    num_steps: Int[Array | np.ndarray, " rows"]  # tokens that it may draw now
    page_table: Int[Array | np.ndarray, "rows pages_per_seq"]
    stop_tokens: Int[Array | np.ndarray, "rows max_stop_tokens"]  # -1 past the last one
    sampling: SamplingRows


def prefill_batch(prefill: PrefillRound, config: EngineConfig, num_tokens: int) -> PrefillBatch:
    """The chunks of a round, padded to `num_tokens` tokens and to `max_prefill_seqs` sequences."""
    num_seqs = config.max_prefill_seqs
    tokens, seqs = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    positions = np.full(num_tokens, -1, np.int32)
    page_table = np.zeros((num_seqs, config.pages_per_seq), np.int32)
    kv_lens = np.zeros(num_seqs, np.int32)
    query_starts = np.zeros(num_seqs + 1, np.int32)
    start = 0
    for row, chunk in enumerate(prefill.chunks):
        end, position_end = start + chunk.num_tokens, chunk.start + chunk.num_tokens
        tokens[start:end] = chunk.sequence.tokens(chunk.start, position_end)
        seqs[start:end] = row
        positions[start:end] = np.arange(chunk.start, position_end)
        page_table[row, : len(chunk.sequence.pages)] = chunk.sequence.pages
        kv_lens[row] = position_end
        query_starts[row + 1 :] = end
        start = end
    return PrefillBatch(tokens, TokenPlaces(page_table, query_starts, kv_lens, seqs, positions))


def decode_batch(decode: DecodeRound, config: EngineConfig, num_rows: int) -> DecodeBatch:
    """The sequences of a round, padded to `num_rows` rows."""
    tokens, num_steps = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    positions = np.full(num_rows, -1, np.int32)
    page_table = np.zeros((num_rows, config.pages_per_seq), np.int32)
    stop_tokens = np.full((num_rows, MAX_STOP_TOKENS), -1, np.int32)
    temperature, top_p = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
    seed, prompt_index, sample_index = (np.zeros(num_rows, np.uint32) for _ in range(3))
    for row, sequence in enumerate(decode.sequences):
        request, sampling = sequence.request, sequence.request.sampling
        tokens[row] = sequence.last_token
        positions[row] = sequence.num_cached
        num_steps[row] = min(config.decode_steps_per_call, sequence.num_remaining)
        page_table[row, : len(sequence.pages)] = sequence.pages
        stop_tokens[row, : len(sampling.stop_token_ids)] = sampling.stop_token_ids
        temperature[row], top_p[row], seed[row] = sampling.temperature, sampling.top_p, sampling.seed
        prompt_index[row], sample_index[row] = request.global_prompt_index, request.sample_index
    rows = SamplingRows(temperature, top_p, seed, prompt_index, sample_index)
    return DecodeBatch(tokens, positions, num_steps, page_table, stop_tokens, rows)
