"""The generation engine: requests in, completions out.

It compiles its programs when it is made, for fixed shapes, and never while it serves; it is handed the weights for
each call and keeps neither them nor the cache. It knows token ids only, no text, and only the devices of its mesh.
"""

import collections.abc
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from simpo_pipeline.distributed.mesh import place
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.errors import CapacityError, ConfigError
from simpo_pipeline.inference.batches import decode_batch, prefill_batch
from simpo_pipeline.inference.config import EngineConfig, pages_for
from simpo_pipeline.inference.forward import decode, prefill
from simpo_pipeline.inference.kv_cache import KVCache, abstract_cache, bytes_per_device, empty_cache
from simpo_pipeline.inference.scheduler import DecodeRound, PrefillRound, Scheduler
from simpo_pipeline.inference.sequence import Completion, Request, Sequence
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama

logger = logging.getLogger(__name__)

Requests = collections.abc.Sequence[Request]
# (generated tokens so far, finished requests, all requests, seconds since the start)
OnProgress = Callable[[int, int, int, float], None]

# Programs of fewer elements than this are rounded otherwise: XLA's CPU backend takes other kernels for them. Above it
# the tests find every row's result independent, to the bit, of how many rows its program has, and of whether that
# program is prefill or decode; so a token depends neither on the batch nor on a preemption nor on the engine's sizes.
_SMALLEST_PROGRAM = 4096


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What one call of `generate` did, and how long the devices took for it."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_preemptions: int = 0


class Engine:
    """Programs of one model at one set of sizes on one mesh."""

    def __init__(
        self,
        model_config: LlamaConfig,
        engine_config: EngineConfig,
        mesh: Mesh,
        programs: Programs,
        dtype: DTypeLike = "float32",
    ) -> None:
        """Compiles ahead for weights of `dtype`, placed by `TENSOR_PARALLEL_RULES` on `mesh` (axis "model").

        Raises: ConfigError if the engine is to hold longer sequences than the model has positions for.
        """
        if engine_config.max_seq_len > model_config.max_seq_len:
            raise ConfigError(
                f"engine.max_seq_len is {engine_config.max_seq_len}, but the model has only "
                f"{model_config.max_seq_len} positions; lower it"
            )
        self.model_config = model_config
        self.config = engine_config
        self._programs = programs
        self._dtype = dtype
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._weights = with_shardings(abstract_llama(model_config, dtype), mesh, TENSOR_PARALLEL_RULES)
        self._cache = abstract_cache(model_config, engine_config, dtype, mesh)
        logger.info(
            "engine: a cache of %d pages of %d tokens, %.2f GiB per device",
            engine_config.total_pages,
            engine_config.page_size,
            self.cache_bytes_per_device / 2**30,
        )
        self._empty_cache = programs.compile(
            "engine_empty_cache",
            functools.partial(empty_cache, model_config, engine_config, dtype),
            out_shardings=self._cache_placement,
        )
        self._prefill = {
            size: self._compile_prefill(size)
            for size in program_sizes(engine_config.prefill_chunk_tokens, model_config)
        }
        self._decode = {
            size: self._compile_decode(size) for size in program_sizes(engine_config.max_seqs, model_config)
        }

    @property
    def cache_bytes_per_device(self) -> int:
        """What each device holds of the cache while `generate` runs."""
        return bytes_per_device(self._cache)

    def check(self, requests: Requests) -> None:
        """Raises CapacityError for the first request that could never be served."""
        check_requests(requests, self.config, self.model_config.vocab_size)

    def generate(
        self, weights: Llama, requests: Requests, *, step: int, on_progress: OnProgress | None = None
    ) -> tuple[list[Completion], GenerationStats]:
        """Serves every request to its end; completions come in the order of the requests.

        `step` (finished updates of the weights) enters every sampling key. `on_progress` is called after each round.

        Raises: CapacityError, before any device work, for a request that could never be served.
        """
        self.check(requests)
        if not requests:
            return [], GenerationStats()
        scheduler = Scheduler(self.config)
        work = [Sequence(request, index) for index, request in enumerate(requests)]
        for sequence in work:
            scheduler.add(sequence)
        clock = _Clock()
        cache = self._empty_cache()
        num_generated = num_finished = 0
        while (current := scheduler.next_round()) is not None:
            if isinstance(current, PrefillRound):
                cache = self._run_prefill(weights, cache, current)
                scheduler.prefilled(current)
                clock.lap("prefill")
            else:
                cache, drawn = self._run_decode(weights, cache, current, step)
                num_generated += sum(map(len, drawn))
                num_finished += len(scheduler.decoded(current, drawn))
                clock.lap("decode")
            if on_progress is not None:
                on_progress(num_generated, num_finished, len(work), clock.elapsed)
        return [sequence.completion() for sequence in work], GenerationStats(
            prompt_tokens=sum(len(request.prompt_tokens) for request in requests),
            generated_tokens=num_generated,
            prefill_seconds=clock.seconds["prefill"],
            decode_seconds=clock.seconds["decode"],
            num_preemptions=scheduler.num_preemptions,
        )

    def _run_prefill(self, weights: Llama, cache: KVCache, current: PrefillRound) -> KVCache:
        num_tokens = _smallest_holding(sum(chunk.num_tokens for chunk in current.chunks), self._prefill)
        batch = prefill_batch(current, self.config, num_tokens)
        return jax.block_until_ready(self._prefill[num_tokens](weights, cache, self._placed(batch)))

    def _run_decode(
        self, weights: Llama, cache: KVCache, current: DecodeRound, step: int
    ) -> tuple[KVCache, list[list[int]]]:
        num_rows = _smallest_holding(len(current.sequences), self._decode)
        batch = self._placed((decode_batch(current, self.config, num_rows), np.uint32(step)))
        cache, drawn = self._decode[num_rows](weights, cache, *batch)
        rows = np.asarray(drawn)[: len(current.sequences)]
        return cache, [row[row >= 0].tolist() for row in rows]

    def _compile_prefill(self, num_tokens: int) -> Program:
        return self._programs.compile(
            f"engine_prefill_{num_tokens}",
            functools.partial(prefill, dtype=self._dtype),
            self._weights,
            self._cache,
            self._abstract(prefill_batch(PrefillRound(()), self.config, num_tokens)),
            donate_argnums=(1,),
            out_shardings=self._cache_placement,
        )

    def _compile_decode(self, num_rows: int) -> Program:
        return self._programs.compile(
            f"engine_decode_{num_rows}",
            functools.partial(decode, max_steps=self.config.decode_steps_per_call, dtype=self._dtype),
            self._weights,
            self._cache,
            self._abstract(decode_batch(DecodeRound(()), self.config, num_rows)),
            self._abstract(np.uint32(0)),
            donate_argnums=(1,),
            out_shardings=(self._cache_placement, self._replicated),
        )

    @property
    def _cache_placement(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self._cache)

    def _abstract(self, arrays: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=self._replicated), arrays
        )

    def _placed(self, arrays: Any) -> Any:
        return place(arrays, self._replicated)


def check_requests(requests: Requests, config: EngineConfig, vocab_size: int) -> None:
    """Refuses what an engine of these sizes could never serve. Needs no engine and no device.

    Raises: CapacityError naming the first such request and the numbers.
    """
    for index, request in enumerate(requests):
        where = f"request {index} (prompt {request.global_prompt_index}, sample {request.sample_index})"
        num_prompt, num_new = len(request.prompt_tokens), request.sampling.max_tokens
        if not num_prompt:
            raise CapacityError(f"{where} has an empty prompt; give it at least one token")
        unknown = [token for token in request.prompt_tokens if not 0 <= token < vocab_size]
        if unknown:
            raise CapacityError(
                f"{where} has token id {unknown[0]}; the model knows 0 to {vocab_size - 1}: "
                "is this the model's own tokenizer?"
            )
        if num_prompt + num_new > config.max_seq_len:
            raise CapacityError(
                f"{where} has {num_prompt} prompt tokens and max_tokens {num_new}, {num_prompt + num_new} in all; "
                f"engine.max_seq_len is {config.max_seq_len}: raise it, or ask for fewer"
            )
        num_pages = pages_for(num_prompt + num_new - 1, config.page_size)  # the last token drawn is not cached
        if num_pages > config.total_pages:
            raise CapacityError(
                f"{where} needs {num_pages} pages of {config.page_size} tokens for {num_prompt} prompt tokens and "
                f"max_tokens {num_new}; engine.num_pages is {config.total_pages}: raise it, or ask for fewer"
            )


class _Clock:
    """Wall seconds, by what they were spent on."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds = {"prefill": 0.0, "decode": 0.0}

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def lap(self, what: str) -> None:
        """Counts the seconds since the last lap."""
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now


def program_sizes(most: int, model: LlamaConfig) -> list[int]:
    """Row counts to compile for, smallest first: a quarter of the most, where that is not too small, and the most."""
    smallest = max(8, pages_for(_SMALLEST_PROGRAM, model.hidden_size))
    largest = max(most, smallest)
    return [largest // 4, largest] if largest // 4 >= smallest else [largest]


def _smallest_holding(size: int, programs: dict[int, Program]) -> int:
    return min(rows for rows in programs if rows >= size)
