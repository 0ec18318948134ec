"""The generation engine: requests in, completions out.

The engine compiles all programs at construction, for fixed shapes, and never while it serves requests. The caller
passes the weights to each call; the engine keeps neither the weights nor the cache. It works on token ids and decodes
text only to find stop strings.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from simpo_pipeline.distributed.mesh import MODEL_AXIS
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.errors import CapacityError, ConfigError, ModelError
from simpo_pipeline.inference.config import EngineSizes, pages_for
from simpo_pipeline.inference.engine_programs import EnginePrograms, EngineWeights
from simpo_pipeline.inference.forward import NOT_FINITE, SampledTokens
from simpo_pipeline.inference.scheduler import Round, Scheduler
from simpo_pipeline.inference.sequence import Completion, Request, SequenceState, TokenLogprobs
from simpo_pipeline.inference.stop_strings import StopMatcher
from simpo_pipeline.inference.text import Decode
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.transformer import Llama
from simpo_pipeline.ops.paged_attention import backend_for

logger = logging.getLogger(__name__)

Requests = Sequence[Request]
# (generated tokens so far, finished requests, all requests, seconds since the start)
OnProgress = Callable[[int, int, int, float], None]
# Requests that finished in one round.
OnFinished = Callable[[list[Completion]], None]
Decided = TypeVar("Decided")


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """Counts and timings of one call of `generate`.

    Attributes:
        prompt_tokens: Total number of prompt tokens; each prompt counts once per sample.
        shared_tokens: Prompt and generated tokens that were not computed (again) because cached pages had them.
        generated_tokens: Total number of tokens of all completions.
        decoded_tokens: Tokens sampled in decode-only rounds. Tokens after a stop string count here, but not in
            `generated_tokens`.
        setup_seconds: Wall time to convert the weights to the programs' layouts and to create an empty cache.
        prefill_seconds: Wall time of rounds with prefill, including the tokens sampled in the same rounds.
        decode_seconds: Wall time of decode-only rounds.
        host_seconds: Part of the wall time between the end of a round and the launch of the next one. The host
            records results, schedules, builds batches and launches while the devices are idle. On GPUs this is not
            idle time: a launch returns only when the round is nearly over, because XLA's host reads loop conditions.
        scheduling_seconds: Part of `host_seconds` spent in the scheduler.
        num_rounds: Number of rounds of device programs.
        num_preemptions: Number of times that a sequence was preempted and its pages were released.
    """

    prompt_tokens: int = 0
    shared_tokens: int = 0
    generated_tokens: int = 0
    decoded_tokens: int = 0
    setup_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    host_seconds: float = 0.0
    scheduling_seconds: float = 0.0
    num_rounds: int = 0
    num_preemptions: int = 0


@dataclasses.dataclass(frozen=True)
class EngineMemory:
    """Memory of an engine during generation, in bytes per device."""

    weights: int
    cache: int
    programs: int  # the layers' second layout, if any, and the largest program's temporaries

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.cache + self.programs


class Engine:
    """Compiled programs for one model, one set of sizes and one mesh."""

    def __init__(
        self,
        model_config: LlamaConfig,
        sizes: EngineSizes,
        mesh: Mesh,
        programs: Programs,
        dtype: DTypeLike = "float32",
        *,
        decode: Decode | None = None,
    ) -> None:
        """Compile the programs for weights of `dtype`, sharded by `TENSOR_PARALLEL_RULES` over `mesh` (axis "model").

        `decode` returns the text of token ids. It is required for requests with stop strings.

        Raises:
            ConfigError: `sizes.max_seq_len` exceeds the model's number of positions, or the page size would change
                generated tokens.
        """
        keys = backend_for(mesh, MODEL_AXIS).keys_per_block
        if keys is not None and keys % sizes.page_size:
            raise ConfigError(
                f"engine.page_size is {sizes.page_size}; on these devices it must divide {keys}, the number "
                "of keys per block of attention; otherwise tokens would depend on the page size"
            )
        if sizes.max_seq_len > model_config.max_seq_len:
            raise ConfigError(
                f"engine.max_seq_len is {sizes.max_seq_len}, but the model has only "
                f"{model_config.max_seq_len} positions; lower it"
            )
        self.model_config = model_config
        self.sizes = sizes
        self._text_of = decode
        self._programs = programs.built_once(
            ("engine", model_config, sizes, mesh, jnp.dtype(dtype)),
            lambda: EnginePrograms(model_config, sizes, mesh, programs, dtype),
        )
        self._log_memory()

    @property
    def memory(self) -> EngineMemory:
        """Memory of the weights, the cache and the programs that are compiled so far."""
        programs = self._programs
        return EngineMemory(programs.weights_bytes, programs.cache_bytes, programs.temporary_bytes)

    def check(self, requests: Requests) -> None:
        """Raise an error for requests that can never be served, before any device work.

        Raises:
            CapacityError: See `check_requests`.
            ConfigError: A request has stop strings, but the engine was created without `decode`; or it has no seed, or
                bad words that are not yet tokens (`with_bad_words`).
        """
        check_requests(requests, self.sizes, self.model_config.vocab_size)
        if self._text_of is None and any(request.sampling.stop for request in requests):
            raise ConfigError("requests have stop strings, but the engine was created without `decode`; pass `decode`")
        if any(request.sampling.seed is None or request.sampling.bad_words for request in requests):
            raise ConfigError(
                "requests have seed None or bad_words; draw a seed, and convert words with `with_bad_words`"
            )

    def lay_out(self, weights: Llama) -> EngineWeights:
        """Convert the weights to the programs' layouts, once for several calls of `generate` with the same weights."""
        return self._programs.lay_out(weights)

    def generate(
        self,
        weights: Llama | EngineWeights,
        requests: Requests,
        *,
        step: int,
        on_progress: OnProgress | None = None,
        on_finished: OnFinished | None = None,
    ) -> tuple[list[Completion], GenerationStats]:
        """Generate a completion for every request; completions are in the order of the requests.

        Args:
            weights: The weights; a `Llama` is converted to the programs' layouts for this call.
            requests: The requests.
            step: The number of updates that the weights have had; part of every sampling key.
            on_progress: Called after each round, while the devices compute the next one.
            on_finished: Called after each round in which requests finished, while the devices compute the next one. If
                the next round fails, both callbacks run before the error propagates.

        Raises:
            CapacityError, ConfigError: See `check`; raised before any device work.
            ModelError: The logits of a request are not finite. The message names the request.
        """
        self.check(requests)
        if not requests:
            return [], GenerationStats()
        if any(request.sampling.adjusts_logits for request in requests) and self._programs.compile_adjusted():
            self._log_memory()
        scheduler = Scheduler(self.sizes, self._programs.chunk_sizes)
        work = [SequenceState(request, index, self._matcher(request)) for index, request in enumerate(requests)]
        for sequence in work:
            scheduler.add(sequence)
        tally = _Tally()
        laid_out = weights if isinstance(weights, EngineWeights) else self.lay_out(weights)
        laid_out, cache = jax.block_until_ready((laid_out, self._programs.empty_cache()))
        tally.set_up()
        ended: list[SequenceState] = []

        def report() -> None:
            finished = [sequence.completion() for sequence in ended]
            ended.clear()
            if on_finished is not None and finished:
                on_finished(finished)
            if on_progress is not None and tally.num_rounds:
                on_progress(tally.num_generated, tally.num_finished, len(work), tally.elapsed)

        current = tally.scheduled(scheduler.next_round)
        try:
            while current is not None:
                cache, drawn = self._programs.run(laid_out, cache, current, np.uint32(step))
                tally.launched()
                report()  # the previous round, while the devices compute this one
                if drawn is None:
                    jax.block_until_ready(cache)
                rows = _fetch_drawn(current, drawn)
                tally.waited(current, sum(len(tokens) for tokens, _ in rows))
                ended += tally.scheduled(functools.partial(scheduler.ran, current, rows))
                tally.num_finished += len(ended)
                current = tally.scheduled(scheduler.next_round)
        finally:
            report()
        num_generated = sum(len(sequence.generated) for sequence in work)
        return [sequence.completion() for sequence in work], tally.stats(requests, num_generated, scheduler)

    def _log_memory(self) -> None:
        sizes, memory = self.sizes, self.memory
        logger.info(
            "engine: %d rows, %d pages of %d tokens; %.2f GiB per device: weights %.2f, cache %.2f, programs %.2f",
            *(sizes.max_seqs, sizes.num_pages, sizes.page_size),
            *(part / 2**30 for part in (memory.total, *dataclasses.astuple(memory))),
        )

    def _matcher(self, request: Request) -> StopMatcher | None:
        if not request.sampling.stop or self._text_of is None:
            return None
        return StopMatcher(self._text_of, request.sampling.stop_strings, request.prompt_tokens)


def check_requests(requests: Requests, sizes: EngineSizes, vocab_size: int) -> None:
    """Raise an error for requests that an engine of these sizes can never serve. Needs no engine and no device.

    Raises:
        CapacityError: A request cannot be served. The message has the index and the sizes of the first such request.
    """
    for index, request in enumerate(requests):
        where = f"request {index} (prompt {request.global_prompt_index}, sample {request.sample_index})"
        num_prompt, num_new = len(request.prompt_tokens), request.sampling.max_tokens
        if not num_prompt:
            raise CapacityError(f"{where} has an empty prompt; give it at least one token")
        unknown = [token for token in request.prompt_tokens if not 0 <= token < vocab_size]
        if unknown:
            raise CapacityError(
                f"{where} has token id {unknown[0]}; the model's token ids are 0 to {vocab_size - 1}: "
                "is this the model's tokenizer?"
            )
        if num_prompt + num_new > sizes.max_seq_len:
            raise CapacityError(
                f"{where} has {num_prompt} prompt tokens and max_tokens {num_new}, {num_prompt + num_new} in total; "
                f"engine.max_seq_len is {sizes.max_seq_len}: raise it, up to the model's limit, or request fewer tokens"
            )
        num_pages = pages_for(num_prompt + num_new - 1, sizes.page_size)  # the last sampled token is not cached
        if num_pages > sizes.num_pages:
            raise CapacityError(
                f"{where} needs {num_pages} pages of {sizes.page_size} tokens for {num_prompt} prompt tokens and "
                f"max_tokens {num_new}; engine.num_pages is {sizes.num_pages}: raise it, or request fewer tokens"
            )


def _fetch_drawn(current: Round, drawn: SampledTokens | None) -> list[tuple[list[int], list[TokenLogprobs]]]:
    """Wait for a round and return each decoding sequence's sampled tokens, with log-probabilities if requested.

    Raises:
        ModelError: The logits of a sequence are not finite.
    """
    if drawn is None:
        return []
    rows = np.asarray(drawn.tokens)[: len(current.decoding)]
    _refuse_not_finite(current, rows)
    counts = np.sum(rows >= 0, axis=1).tolist()
    tokens = [row[:count] for row, count in zip(rows.tolist(), counts, strict=True)]
    num_tops = [sequence.request.sampling.logprobs for sequence in current.decoding]
    if all(each is None for each in num_tops):
        return [(each, []) for each in tokens]
    chosen, top_ids, top_logprobs = (np.asarray(each) for each in (drawn.chosen, drawn.top_ids, drawn.top_logprobs))
    return [
        (
            each,
            []
            if num_top is None
            else [
                TokenLogprobs(
                    float(chosen[row, at]),
                    _top_pairs(top_ids[row, at, :num_top], top_logprobs[row, at, :num_top]),
                )
                for at in range(len(each))
            ],
        )
        for row, (each, num_top) in enumerate(zip(tokens, num_tops, strict=True))
    ]


def _top_pairs(
    token_ids: Int[np.ndarray, " tops"], logprobs: Float[np.ndarray, " tops"]
) -> tuple[tuple[int, float], ...]:
    """Return the pairs of the most likely tokens; fewer than requested if the vocabulary is smaller."""
    pairs = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    return tuple((token, logprob) for token, logprob in pairs if token >= 0)


def _refuse_not_finite(current: Round, rows: Int[np.ndarray, "rows max_steps"]) -> None:
    wrong = np.argwhere(rows == NOT_FINITE).tolist()
    if not wrong:
        return
    row, at = wrong[0]
    sequence = current.decoding[row]
    request, num_tokens = sequence.request, len(sequence.generated) + at
    others = f", and neither are those of {len(wrong) - 1} other requests" if len(wrong) > 1 else ""
    raise ModelError(
        f"the logits of prompt {request.global_prompt_index}, sample {request.sample_index} are not finite after "
        f"{len(request.prompt_tokens)} prompt tokens and {num_tokens} generated tokens{others}. The weights hold NaN "
        "or infinity, or the data type cannot hold what they compute: check where they come from, or use float32"
    )


class _Tally:
    """Counts and wall times of one call of `generate`."""

    def __init__(self) -> None:
        self._start = self._waited = time.perf_counter()
        self._setup_seconds = self._host_seconds = self._scheduling_seconds = 0.0
        self._seconds = {True: 0.0, False: 0.0}  # keyed by whether the round had chunks
        self._tokens = {True: 0, False: 0}
        self.num_rounds = 0
        self.num_finished = 0

    @property
    def num_generated(self) -> int:
        """Number of tokens sampled so far."""
        return sum(self._tokens.values())

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def set_up(self) -> None:
        """Record that the weights and the cache are ready."""
        self._waited = time.perf_counter()
        self._setup_seconds = self._waited - self._start

    def scheduled(self, decide: Callable[[], Decided]) -> Decided:
        """Return the scheduler's result and add its time to the scheduling time."""
        start = time.perf_counter()
        decision = decide()
        self._scheduling_seconds += time.perf_counter() - start
        return decision

    def launched(self) -> None:
        """Record that a round has been launched."""
        self._host_seconds += time.perf_counter() - self._waited

    def waited(self, current: Round, num_drawn: int) -> None:
        """Record that a round has finished and the devices are idle."""
        now = time.perf_counter()
        self._seconds[bool(current.chunks)] += now - self._waited
        self._tokens[bool(current.chunks)] += num_drawn
        self._waited = now
        self.num_rounds += 1

    def stats(self, requests: Requests, num_generated: int, scheduler: Scheduler) -> GenerationStats:
        """Return the statistics of the call."""
        return GenerationStats(
            prompt_tokens=sum(len(request.prompt_tokens) for request in requests),
            shared_tokens=scheduler.num_shared_tokens,
            generated_tokens=num_generated,
            decoded_tokens=self._tokens[False],
            setup_seconds=self._setup_seconds,
            prefill_seconds=self._seconds[True],
            decode_seconds=self._seconds[False],
            host_seconds=self._host_seconds,
            scheduling_seconds=self._scheduling_seconds,
            num_rounds=self.num_rounds,
            num_preemptions=scheduler.num_preemptions,
        )
