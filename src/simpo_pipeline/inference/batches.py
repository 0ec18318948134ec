"""Batches of fixed shapes, built in NumPy from scheduler rounds as inputs of the device programs."""

from collections.abc import Sequence

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, UInt32

from simpo_pipeline.inference.config import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, EngineSizes
from simpo_pipeline.inference.logit_adjustments import LogitAdjustments
from simpo_pipeline.inference.sampling import SamplingRows
from simpo_pipeline.inference.scheduler import PrefillChunk, Round
from simpo_pipeline.inference.seen_tokens import seen_bits, seen_words
from simpo_pipeline.inference.sequence import SequenceState


class PrefillBatch(eqx.Module):
    """Prompt tokens of several sequences, concatenated."""

    tokens: Int[Array | np.ndarray, " tokens"]
    positions: Int[Array | np.ndarray, " tokens"]  # position in the sequence; -1 for padding
    seqs: Int[Array | np.ndarray, " tokens"]  # row of `page_table` of each token's sequence
    page_table: Int[Array | np.ndarray, "seqs pages_per_seq"]
    query_starts: Int[Array | np.ndarray, " seqs_and_end"]
    kv_lens: Int[Array | np.ndarray, " seqs"]


class DecodeBatch(eqx.Module):
    """Sequences that sample tokens, one per row; rows past the last sequence are padding."""

    tokens: Int[Array | np.ndarray, " rows"]  # the last token of each sequence, not yet in the cache
    positions: Int[Array | np.ndarray, " rows"]  # position of that token; -1 for padding rows
    num_steps: Int[Array | np.ndarray, " rows"]  # maximum number of tokens to sample; 0 for padding rows
    num_ended: Int[Array | np.ndarray, ""]  # the round ends when this number of rows has finished
    page_table: Int[Array | np.ndarray, "rows pages_per_seq"]
    sampling: SamplingRows
    seen: UInt32[Array | np.ndarray, "rows words"]  # bit set of the sequence's tokens, for the repetition penalty


def prefill_batch(chunks: Sequence[PrefillChunk], sizes: EngineSizes, num_tokens: int) -> PrefillBatch:
    """Return the chunks of a round, padded to `num_tokens` tokens and `max_prefill_seqs` sequences."""
    num_seqs = sizes.max_prefill_seqs
    tokens, seqs = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    positions = np.full(num_tokens, -1, np.int32)
    page_table = np.zeros((num_seqs, sizes.pages_per_seq), np.int32)
    kv_lens = np.zeros(num_seqs, np.int32)
    query_starts = np.zeros(num_seqs + 1, np.int32)
    start = 0
    for row, chunk in enumerate(chunks):
        end, position_end = start + chunk.num_tokens, chunk.start + chunk.num_tokens
        tokens[start:end] = chunk.sequence.tokens(chunk.start, position_end)
        seqs[start:end] = row
        positions[start:end] = np.arange(chunk.start, position_end)
        page_table[row, : len(chunk.sequence.pages)] = chunk.sequence.pages
        kv_lens[row] = position_end
        query_starts[row + 1 :] = end
        start = end
    return PrefillBatch(tokens, positions, seqs, page_table, query_starts, kv_lens)


def decode_batch(
    current: Round, sizes: EngineSizes, num_rows: int, vocab_size: int, *, adjusts_logits: bool = False
) -> DecodeBatch:
    """Return the decoding sequences of a round, padded to `num_rows` rows, with or without `LogitAdjustments`."""
    rows = current.decoding
    tokens, positions, num_steps = (
        np.zeros(num_rows, np.int32),
        np.full(num_rows, -1, np.int32),
        np.zeros(num_rows, np.int32),
    )
    page_table = np.zeros((num_rows, sizes.pages_per_seq), np.int32)
    for row, sequence in enumerate(rows):
        tokens[row] = sequence.last_token
        positions[row] = sequence.num_cached
        num_steps[row] = min(current.num_steps, sequence.num_remaining)
        page_table[row, : len(sequence.pages)] = sequence.pages
    return DecodeBatch(
        tokens,
        positions,
        num_steps,
        np.array(current.num_ended, np.int32),
        page_table,
        _sampling_rows(rows, num_rows, _adjustments(rows, sizes, num_rows) if adjusts_logits else None),
        _seen_rows(rows, num_rows, vocab_size),
    )


def _sampling_rows(rows: Sequence[SequenceState], num_rows: int, adjustments: LogitAdjustments | None) -> SamplingRows:
    temperature, top_p, penalty = (
        np.zeros(num_rows, np.float32),
        np.ones(num_rows, np.float32),
        np.ones(num_rows, np.float32),
    )
    min_p, top_k = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int32)
    seed, prompt_index, sample_index = (np.zeros(num_rows, np.uint32) for _ in range(3))
    first_stop, logprobs = np.zeros(num_rows, np.int32), np.full(num_rows, -1, np.int32)
    stop_tokens = np.full((num_rows, MAX_STOP_TOKENS), -1, np.int32)
    for row, sequence in enumerate(rows):
        request = sequence.request
        sampling = request.sampling
        assert sampling.seed is not None, "the engine serves no request without a seed"
        temperature[row], top_k[row], top_p[row] = sampling.temperature, sampling.top_k, sampling.top_p
        min_p[row], penalty[row] = sampling.min_p, sampling.repetition_penalty
        seed[row], prompt_index[row], sample_index[row] = (
            sampling.seed,
            request.global_prompt_index,
            request.sample_index,
        )
        first_stop[row] = len(request.prompt_tokens) + sampling.min_tokens
        stop_tokens[row, : len(sampling.stop_tokens)] = sampling.stop_tokens
        if sampling.logprobs is not None:
            logprobs[row] = sampling.logprobs
    return SamplingRows(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=penalty,
        seed=seed,
        prompt_index=prompt_index,
        sample_index=sample_index,
        first_stop=first_stop,
        stop_tokens=stop_tokens,
        logprobs=logprobs,
        adjustments=adjustments,
    )


def _adjustments(rows: Sequence[SequenceState], sizes: EngineSizes, num_rows: int) -> LogitAdjustments:
    presence, frequency = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.float32)
    bias_tokens = np.full((num_rows, MAX_LOGIT_BIAS), -1, np.int32)
    biases = np.zeros((num_rows, MAX_LOGIT_BIAS), np.float32)
    generated = np.full((num_rows, sizes.max_seq_len), -1, np.int32)
    for row, sequence in enumerate(rows):
        sampling = sequence.request.sampling
        presence[row], frequency[row] = sampling.presence_penalty, sampling.frequency_penalty
        for at, (token, bias) in enumerate(sampling.biases):
            bias_tokens[row, at], biases[row, at] = token, bias
        generated[row, : len(sequence.generated)] = sequence.generated
    return LogitAdjustments(presence, frequency, bias_tokens, biases, generated)


def _seen_rows(rows: Sequence[SequenceState], num_rows: int, vocab_size: int) -> UInt32[np.ndarray, "rows words"]:
    seen = np.zeros((num_rows, seen_words(vocab_size)), np.uint32)
    for row, sequence in enumerate(rows):
        if sequence.request.sampling.repetition_penalty != 1:
            seen[row] = seen_bits(sequence.tokens(0, sequence.num_tokens), vocab_size)
    return seen
