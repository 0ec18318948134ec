"""Keys and values are bitwise equal in every program, so a token never depends on its batch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY

from simpo_pipeline.inference.batches import decode_batch, prefill_batch
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine_programs import COMPILER_OPTIONS, program_sizes
from simpo_pipeline.inference.forward import decode, lay_out, prefill, prefill_and_decode
from simpo_pipeline.inference.kv_cache import KVCache, empty_cache
from simpo_pipeline.inference.scheduler import PrefillChunk, Round
from simpo_pipeline.inference.sequence import Request, SequenceState
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama, UnstackedLlama
from simpo_pipeline.ops.paged_attention_cpu import CpuPagedAttention

# The widths of SmolLM2-135M with fewer layers, and a model whose query heads share no keys.
WIDE = LlamaConfig(576, 1536, 1, 9, 3, 64, 300, 256, initializer_range=0.05, tie_word_embeddings=True)
UNGROUPED = LlamaConfig(48, 96, 2, 3, 3, 16, 300, 256, initializer_range=0.2)
NUM_TOKENS = 80


class Runner:
    """One sequence of known tokens, cached by prefill or by decode in programs of chosen sizes."""

    def __init__(self, model: LlamaConfig, weights: Llama, dtype: str) -> None:
        self.model = model
        self.dtype = dtype
        cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree))(weights)
        bits, by_layer = jax.jit(lay_out)(cast.layers)
        rest = (cast.final_norm, cast.head, cast.config)
        self.stacked = cast if bits is None else Llama(cast.embedding, bits, *rest)
        self.by_layer = UnstackedLlama(cast.embedding, by_layer, *rest)
        jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
        self.prefill = jit(functools.partial(prefill, dtype=jnp.dtype(dtype)))
        self.mixed = jit(functools.partial(prefill_and_decode, dtype=jnp.dtype(dtype)))
        self.decode = jit(functools.partial(decode, max_steps=1, dtype=jnp.dtype(dtype)))
        self.sizes = EngineSizes(max_seqs=300, max_seq_len=128, page_size=16, num_pages=80, prefill_chunk_tokens=1024)
        self.rng = np.random.default_rng(0)
        self.tokens = tuple(self.rng.integers(0, model.vocab_size, size=NUM_TOKENS).tolist())

    def sequence_of(self, tokens: tuple[int, ...], pages: range) -> SequenceState:
        sequence = SequenceState(Request(tokens, 0, 0, SamplingParams(1, temperature=0.0)), 0)
        sequence.pages = list(pages)
        return sequence

    def others(self) -> list[SequenceState]:
        """Return five sequences of random tokens and lengths."""
        lengths = self.rng.integers(2, NUM_TOKENS, size=5)
        prompts = [tuple(self.rng.integers(0, self.model.vocab_size, size=length).tolist()) for length in lengths]
        return [self.sequence_of(prompt, range(8 * (row + 1), 8 * (row + 2))) for row, prompt in enumerate(prompts)]

    def prefilled(self, cache: KVCache, end: int, program_tokens: int, chunk: int) -> KVCache:
        """Prefill the tokens up to `end`, `chunk` at a time, with other sequences before and after them."""
        for start in range(0, end, chunk):
            before, *after = self.others()[:2]
            sequence = self.sequence_of(self.tokens, range(8))
            chunks = [
                PrefillChunk(before, 0, 1 + start // 20),
                PrefillChunk(sequence, start, min(chunk, end - start)),
                *(PrefillChunk(other, 0, 1) for other in after),
            ]
            cache = self.prefill(self.stacked, cache, prefill_batch(tuple(chunks), self.sizes, program_tokens))
        return cache

    def decoded(self, cache: KVCache, start: int, num_rows: int, row: int, *, beside_chunks: bool = False) -> KVCache:
        """Decode the tokens from `start` on, one per call, in the given row among other sequences."""
        for position in range(start, NUM_TOKENS):
            sequence = self.sequence_of(self.tokens[: position + 1], range(8))
            sequence.num_cached = position
            rows = self.others()
            rows.insert(row, sequence)
            batch = decode_batch(Round((), tuple(rows), 1, len(rows), ()), self.sizes, num_rows, self.model.vocab_size)
            if beside_chunks:
                chunk = PrefillChunk(self.sequence_of(self.tokens, range(56, 64)), 0, 1 + position % 7)
                chunks = prefill_batch((chunk,), self.sizes, program_sizes(512, self.model)[0])
                cache, _ = self.mixed(self.stacked, cache, chunks, batch, jnp.uint32(0))
            else:
                cache, _ = self.decode(self.by_layer, cache, batch, jnp.uint32(0))
        return cache

    def cached(self, cache: KVCache) -> np.ndarray:
        """Return keys and values of the sequence's tokens in every layer, as bits."""
        keys, values = (
            np.asarray(pages).reshape(self.model.num_layers, self.sizes.num_pages, *pages.shape[1:])[:, :8]
            for pages in cache.pages
        )
        both = np.stack([np.moveaxis(keys, 4, 2), np.moveaxis(values, 3, 2)])
        return both.view(np.uint32 if both.dtype == np.float32 else np.uint16)

    def empty(self) -> KVCache:
        return jax.jit(lambda: empty_cache(self.model, self.sizes, self.dtype, CpuPagedAttention()))()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        pytest.param(WIDE, "float32", id="wide"),
        # So narrow that the width determines the smallest program: 4,096 elements.
        pytest.param(TINY, "bfloat16", id="narrow, bfloat16"),
        pytest.param(UNGROUPED, "float32", id="ungrouped"),
    ],
)
def test_keys_and_values_are_the_same_bits_in_every_program(
    model: LlamaConfig, dtype: str, weights_of: Callable[[LlamaConfig], Llama]
) -> None:
    runner = Runner(model, weights_of(model), dtype)
    few_rows, many_rows = program_sizes(300, model)[0], 300
    few_tokens, many_tokens = program_sizes(512, model)[0], 1024
    expected = runner.cached(runner.prefilled(runner.empty(), NUM_TOKENS, many_tokens, NUM_TOKENS))
    assert expected.any()
    in_chunks = runner.prefilled(runner.empty(), NUM_TOKENS, few_tokens, 40)
    np.testing.assert_array_equal(runner.cached(in_chunks), expected)
    for num_rows, row, beside_chunks in ((few_rows, 5, False), (many_rows, 2, False), (few_rows, 0, True)):
        part = runner.prefilled(runner.empty(), 60, few_tokens, 60)  # the rest crosses a boundary between key blocks
        whole = runner.decoded(part, 60, num_rows, row, beside_chunks=beside_chunks)
        np.testing.assert_array_equal(runner.cached(whole), expected)
