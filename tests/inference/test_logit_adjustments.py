"""Biases and penalties per generated token follow their definitions exactly, in any batch, and cost nothing unused."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from tiny_model import TINY

from simpo_pipeline.distributed.programs import Program
from simpo_pipeline.inference import forward, sampling
from simpo_pipeline.inference.config import MAX_LOGIT_BIAS, EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.engine_programs import EnginePrograms
from simpo_pipeline.inference.logit_adjustments import (
    LogitAdjustments,
    biased,
    counted,
    first_counts,
    less_repeated,
)
from simpo_pipeline.inference.sequence import Completion, Request
from simpo_pipeline.model.transformer import Llama

VOCAB = TINY.vocab_size
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
BIASES = {0: -math.inf, 31: 4.0, 32: -2.5, VOCAB - 1: 7.0}
PENALISED = dataclasses.replace(GREEDY, presence_penalty=0.7, frequency_penalty=1.3)
BIASED = dataclasses.replace(GREEDY, logit_bias=BIASES)
ALL = dataclasses.replace(
    GREEDY, presence_penalty=-0.4, frequency_penalty=0.9, logit_bias=BIASES, repetition_penalty=1.4
)
DRAWN = dataclasses.replace(ALL, temperature=0.8, top_k=40, seed=3, min_tokens=4, stop_token_ids=(1, 2, 3))
SAMPLINGS = {"penalties": PENALISED, "biases": BIASED, "all": ALL}


def adjusted_logits(
    logits: np.ndarray, settings: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> np.ndarray:
    """Return the logits by the definitions: bias, repetition penalty, frequency penalty, presence penalty."""
    scores = logits.astype(np.float32).copy()
    for token, bias in settings.biases:
        scores[token] += np.float32(bias)
    for token in {*prompt, *generated}:
        penalty = np.float32(settings.repetition_penalty)
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(generated):
        scores[token] -= np.float32(settings.frequency_penalty) * np.float32(generated.count(token))
        scores[token] -= np.float32(settings.presence_penalty)
    return scores


def requests_of(settings: SamplingParams, count: int, first: int = 0) -> list[Request]:
    rng = np.random.default_rng(first)
    sizes = rng.integers(1, 30, size=count)
    return [
        Request(tuple(rng.integers(0, VOCAB, size=size).tolist()), first + index, 0, settings)
        for index, size in enumerate(sizes.tolist())
    ]


def tokens_of(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


@pytest.mark.parametrize("settings", SAMPLINGS.values(), ids=SAMPLINGS)
def test_greedy_tokens_follow_the_definition(
    settings: SamplingParams, weights: Llama, engine_of: Callable[..., Engine], next_logits: Callable
) -> None:
    requests = requests_of(settings, 4)
    completions, _ = engine_of().generate(weights, requests, step=0)
    plain, _ = engine_of().generate(weights, requests_of(GREEDY, 4), step=0)
    assert tokens_of(completions) != tokens_of(plain), "the adjustments must change something"
    for request, completion in zip(requests, completions, strict=True):
        generated: list[int] = []
        for _ in range(settings.max_tokens):
            logits = next_logits([*request.prompt_tokens, *generated])
            generated.append(int(np.argmax(adjusted_logits(logits, settings, request.prompt_tokens, generated))))
        assert list(completion.tokens) == generated


def test_a_request_gives_the_same_tokens_alone_and_among_others(
    weights: Llama, engine_of: Callable[..., Engine]
) -> None:
    kinds = (GREEDY, PENALISED, BIASED, ALL, DRAWN, dataclasses.replace(GREEDY, temperature=0.9, seed=8))
    requests = [
        dataclasses.replace(request, sampling=kinds[index % len(kinds)])
        for index, request in enumerate(requests_of(GREEDY, 24))
    ]
    together, _ = engine_of().generate(weights, requests, step=2)
    for start in range(6):
        alone, _ = engine_of().generate(weights, requests[start::6], step=2)
        assert tokens_of(alone) == tokens_of(together)[start::6]


@pytest.mark.slow
def test_a_preempted_request_keeps_the_counts_of_its_tokens(weights: Llama, engine_of: Callable[..., Engine]) -> None:
    requests = requests_of(dataclasses.replace(ALL, max_tokens=30), 24)
    expected, _ = engine_of().generate(weights, requests, step=2)
    tight, stats = engine_of(num_pages=8).generate(weights, requests, step=2)
    assert stats.num_preemptions > 0 and tokens_of(tight) == tokens_of(expected)


class Tracer:
    """Stands for `Programs`; traces each program and compiles none."""

    def compile(self, name: str, function: Callable[..., Any], *abstract_args: Any, **how: Any) -> Program:
        jax.eval_shape(function, *abstract_args)
        return object.__new__(Program)


def test_programs_without_adjustments_trace_none_of_them(
    mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(*args: Any) -> None:
        raise AssertionError("traced an adjustment")

    for module, names in ((forward, ("first_counts", "counted")), (sampling, ("biased", "less_repeated"))):
        for name in names:
            monkeypatch.setattr(module, name, trace)
    make = inspect.unwrap(EnginePrograms.__init__)  # without the type checks of tests, which refuse the tracer
    programs = object.__new__(EnginePrograms)
    sizes = EngineSizes(max_seqs=6, max_seq_len=64, page_size=8, num_pages=48, prefill_chunk_tokens=64)
    make(programs, TINY, sizes, mesh, Tracer(), "float32")
    with pytest.raises(AssertionError, match="traced an adjustment"):
        programs.compile_adjusted()


ROWS, POSITIONS = 5, 40


def random_adjustments(rng: np.random.Generator) -> LogitAdjustments:
    """Return rows of which the first adjusts nothing."""
    presence, frequency = (rng.uniform(-2, 2, ROWS).astype(np.float32) for _ in range(2))
    tokens = np.full((ROWS, MAX_LOGIT_BIAS), -1, np.int32)
    biases = np.zeros((ROWS, MAX_LOGIT_BIAS), np.float32)
    for row in range(1, ROWS):
        chosen = rng.permutation(VOCAB)[: 60 * row]
        tokens[row, : len(chosen)], biases[row, : len(chosen)] = chosen, rng.normal(size=len(chosen)) * 5
    presence[0] = frequency[0] = 0
    generated = np.where(rng.random((ROWS, POSITIONS)) < 0.7, rng.integers(0, 20, (ROWS, POSITIONS)), -1)
    return LogitAdjustments(presence, frequency, tokens, biases, generated.astype(np.int32))


@pytest.mark.parametrize("seed", range(3))
def test_adjusted_logits_are_the_bits_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    adjustments = random_adjustments(rng)
    logits = (rng.normal(size=(ROWS, VOCAB)) * 6).astype(np.float32)
    drawn, alive = rng.integers(0, 20, (4, ROWS), dtype=np.int32), rng.random((4, ROWS)) < 0.7

    @functools.partial(jax.jit, static_argnums=3)
    def adjust(
        logits: jax.Array, adjustments: LogitAdjustments, rounds: tuple[np.ndarray, np.ndarray], vocab: int
    ) -> tuple[jax.Array, jax.Array]:
        counts = first_counts(adjustments, vocab)
        for tokens, rows_alive in zip(*rounds, strict=True):
            counts = counted(counts, tokens, rows_alive)
        return less_repeated(biased(logits, adjustments), adjustments, counts), counts

    found, counts = adjust(logits, adjustments, (drawn, alive), VOCAB)
    for row in range(ROWS):
        generated = [int(token) for token in np.asarray(adjustments.generated)[row] if token >= 0]
        generated += [int(token) for token, lives in zip(drawn[:, row], alive[:, row], strict=True) if lives]
        np.testing.assert_array_equal(np.asarray(counts)[row], np.bincount(generated, minlength=VOCAB))
        pairs = zip(np.asarray(adjustments.bias_tokens)[row], np.asarray(adjustments.biases)[row], strict=True)
        settings = SamplingParams(
            presence_penalty=float(np.asarray(adjustments.presence_penalty)[row]),
            frequency_penalty=float(np.asarray(adjustments.frequency_penalty)[row]),
            logit_bias={int(token): float(bias) for token, bias in pairs if token >= 0},
        )
        np.testing.assert_array_equal(np.asarray(found)[row], adjusted_logits(logits[row], settings, (), generated))
    np.testing.assert_array_equal(np.asarray(found)[0], logits[0])
