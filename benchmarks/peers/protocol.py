"""Protocol between the benchmark and a process that generates or trains: one JSON object per line in each direction.

The process is started with its settings as one JSON argument. It reports once that it is ready, with the versions of
its packages; then each request gets one answer:

    {"prompts": [[token, ...], ...], "max_tokens": n}     for a process that generates (`serve`)
    {}                                                    for a process that trains (`serve_updates`): one update

Between requests the process sleeps in a read, so that several can take turns on one machine. This module uses only
the standard library, because every environment imports it.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Prompts = list[list[int]]
# Generates all tokens of all prompts, greedily and ignoring end tokens. Its answer has the generated `tokens` of each
# prompt; `prefill_seconds`, `decode_seconds` and the `decode_tokens` drawn in those, if known; and anything else.
Generate = Callable[[Prompts, int], dict[str, Any]]
# Generates for one batch. It returns the tokens of each prompt, and time.perf_counter() at the end of the prefill.
GenerateBatch = Callable[[Prompts, int], tuple[list[list[int]], float]]
# Makes one update and returns its loss.
Update = Callable[[], float]


class Recipe(NamedTuple):
    """Training recipe of every contestant: SimPO as in the paper, AdamW, clipping by the global norm."""

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


RECIPE = Recipe()


class Pair(NamedTuple):
    """Token ids of both sequences, and the start of their answers."""

    chosen: list[int]
    rejected: list[int]
    start: int


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process since its start, including loading and compiling."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def serve(distributions: Sequence[str], load: Callable[[dict[str, Any]], Generate]) -> None:
    """Load, then generate until the input ends; `distributions` are the packages whose versions are reported."""

    def load_all(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        generate = load(settings)

        def answer(request: dict[str, Any]) -> dict[str, Any]:
            prompts, max_tokens = request["prompts"], request["max_tokens"]
            found = generate(prompts, max_tokens)
            wrong = [len(tokens) for tokens in found["tokens"] if len(tokens) != max_tokens]
            assert len(found["tokens"]) == len(prompts) and not wrong, f"not {max_tokens} tokens each: {wrong}"
            counts = {"prompt_tokens": sum(map(len, prompts)), "generated_tokens": sum(map(len, found["tokens"]))}
            return found | counts

        return answer

    _answer_requests(distributions, load_all)


def in_batches(batch: int, generate_batch: GenerateBatch) -> Generate:
    """Return a function that generates for `batch` prompts at a time, one batch after another."""

    def generate(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        tokens: list[list[int]] = []
        prefill_seconds = decode_seconds = 0.0
        for first in range(0, len(prompts), batch):
            start = time.perf_counter()
            drawn, prefilled = generate_batch(prompts[first : first + batch], max_tokens)
            tokens += drawn
            prefill_seconds += prefilled - start
            decode_seconds += time.perf_counter() - prefilled
        return {
            "tokens": tokens,
            "prefill_seconds": prefill_seconds,
            "decode_seconds": decode_seconds,
            "decode_tokens": len(prompts) * (max_tokens - 1),
        }

    return generate


def serve_updates(distributions: Sequence[str], load: Callable[[dict[str, Any], list[Pair]], Update]) -> None:
    """Load, then make an update for each request, all on the same pairs.

    Settings: `model` (a folder), `threads`, and `pairs`, each as `Pair`.
    """

    def load_all(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        update = load(settings, [Pair(*pair) for pair in settings["pairs"]])
        return lambda request: {"loss": update()}

    _answer_requests(distributions, load_all)


def _answer_requests(
    distributions: Sequence[str], load: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]
) -> None:
    # Answers get their own file descriptor; the output of libraries goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    answer = load(json.loads(sys.argv[1]))
    say({"versions": {name: importlib.metadata.version(name) for name in distributions}})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        found = answer(request)
        say(found | {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes()})
