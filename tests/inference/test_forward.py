"""The bits behind the law that a token never depends on its company: keys and values as each program makes them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.inference.batches import decode_batch, prefill_batch
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.inference.engine import program_sizes
from simpo_pipeline.inference.forward import decode, prefill
from simpo_pipeline.inference.kv_cache import KVCache, empty_cache
from simpo_pipeline.inference.scheduler import DecodeRound, PrefillChunk, PrefillRound
from simpo_pipeline.inference.sequence import Request, Sequence
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama

# Narrow enough that the smallest program is held up by the width: 4,096 elements.
NARROW = LlamaConfig(64, 96, 2, 4, 2, 16, 300, 256, initializer_range=0.2, tie_word_embeddings=True)
# The widths of SmolLM2-135M, fewer layers, and a model whose query heads share no keys.
WIDE = LlamaConfig(576, 1536, 1, 9, 3, 64, 300, 256, initializer_range=0.05, tie_word_embeddings=True)
UNGROUPED = LlamaConfig(48, 96, 2, 3, 3, 16, 300, 256, initializer_range=0.2)
NUM_TOKENS = 80


class Runner:
    """One sequence of known tokens, cached by prefill or by decode, in programs of chosen sizes."""

    def __init__(self, model: LlamaConfig, weights: Llama) -> None:
        self.model = model
        self.weights = weights
        self.prefill = jax.jit(functools.partial(prefill, dtype=jnp.float32))
        self.decode = jax.jit(functools.partial(decode, max_steps=1, dtype=jnp.float32))
        self.config = EngineConfig(max_seqs=300, max_seq_len=128, prefill_chunk_tokens=1024, num_pages=80)
        self.rng = np.random.default_rng(0)
        self.tokens = tuple(self.rng.integers(0, model.vocab_size, size=NUM_TOKENS).tolist())

    def sequence_of(self, tokens: tuple[int, ...], pages: range) -> Sequence:
        sequence = Sequence(Request(tokens, 0, 0, SamplingParams(1, temperature=0.0)), 0)
        sequence.pages = list(pages)
        return sequence

    def others(self) -> list[Sequence]:
        """Five sequences of random tokens and lengths."""
        lengths = self.rng.integers(2, NUM_TOKENS, size=5)
        prompts = [tuple(self.rng.integers(0, self.model.vocab_size, size=length).tolist()) for length in lengths]
        return [self.sequence_of(prompt, range(8 * (row + 1), 8 * (row + 2))) for row, prompt in enumerate(prompts)]

    def prefilled(self, cache: KVCache, end: int, program_tokens: int, chunk: int) -> KVCache:
        """Tokens up to `end` through prefill, `chunk` at a time, other sequences before and after them."""
        for start in range(0, end, chunk):
            before, *after = self.others()[:2]
            sequence = self.sequence_of(self.tokens, range(8))
            chunks = [
                PrefillChunk(before, 0, 1 + start // 20),
                PrefillChunk(sequence, start, min(chunk, end - start)),
                *(PrefillChunk(other, 0, 1) for other in after),
            ]
            cache = self.prefill(
                self.weights, cache, prefill_batch(PrefillRound(tuple(chunks)), self.config, program_tokens)
            )
        return cache

    def decoded(self, cache: KVCache, start: int, num_rows: int, row: int) -> KVCache:
        """Tokens from `start` on through decode, one a call, in the given row among other sequences."""
        for position in range(start, NUM_TOKENS):
            sequence = self.sequence_of(self.tokens[: position + 1], range(8))
            sequence.num_cached = position
            rows = self.others()
            rows.insert(row, sequence)
            batch = decode_batch(DecodeRound(tuple(rows)), self.config, num_rows)
            cache, _ = self.decode(self.weights, cache, batch, jnp.uint32(0))
        return cache

    def cached(self, cache: KVCache) -> np.ndarray:
        """Keys and values of the sequence's tokens in every layer, as bits."""
        by_layer = (self.model.num_layers, self.config.total_pages)
        keys = np.asarray(cache.keys).reshape(*by_layer, *cache.keys.shape[1:])[:, :8]
        values = np.asarray(cache.values).reshape(*by_layer, *cache.values.shape[1:])[:, :8]
        return np.stack([np.moveaxis(keys, 4, 2), np.moveaxis(values, 3, 2)]).view(np.uint32)

    def empty(self) -> KVCache:
        return jax.jit(lambda: empty_cache(self.model, self.config, jnp.float32))()


@pytest.mark.parametrize("model", [NARROW, WIDE, UNGROUPED], ids=["narrow", "wide", "ungrouped"])
def test_keys_and_values_are_the_same_bits_whichever_program_makes_them(
    model: LlamaConfig, weights_of: Callable[[LlamaConfig], Llama]
) -> None:
    runner = Runner(model, weights_of(model))
    few_rows, many_rows = program_sizes(300, model)[0], 300
    few_tokens, many_tokens = program_sizes(512, model)[0], 1024
    expected = runner.cached(runner.prefilled(runner.empty(), NUM_TOKENS, many_tokens, NUM_TOKENS))
    assert expected.any()
    in_chunks = runner.prefilled(runner.empty(), NUM_TOKENS, few_tokens, 40)
    np.testing.assert_array_equal(runner.cached(in_chunks), expected)
    for num_rows, row in ((few_rows, 5), (many_rows, 2)):
        part = runner.prefilled(runner.empty(), 60, few_tokens, 60)  # the rest crosses from one key block to the next
        np.testing.assert_array_equal(runner.cached(runner.decoded(part, 60, num_rows, row)), expected)
