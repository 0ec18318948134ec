"""How a process that generates talks to the benchmark: one JSON object a line, requests in and answers out.

It is started with its settings as one JSON argument, and says once that it is ready, with the versions of what it is
made of; then each request `{"prompts": [[token, ...], ...], "max_tokens": n}` gets one answer. Between requests it
sleeps in a read, so that several of them can take turns on one machine. Standard library only: every environment
imports it.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Prompts = list[list[int]]
# Serves all prompts to the end, greedily and past every end token. Its answer: the generated `tokens` of each prompt;
# `prefill_seconds`, `decode_seconds` and the `decode_tokens` drawn in those, where it can tell; and what else it likes.
Generate = Callable[[Prompts, int], dict[str, Any]]


def peak_rss_bytes() -> int:
    """The most memory this process has had resident since its start, loading and compiling included."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def serve(distributions: Sequence[str], load: Callable[[dict[str, Any]], Generate]) -> None:
    """Loads, then answers until its input ends; `distributions` are those whose versions it states."""
    # Answers get a descriptor of their own: what libraries print goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    generate = load(json.loads(sys.argv[1]))
    say({"versions": {name: importlib.metadata.version(name) for name in distributions}})
    for line in sys.stdin:
        request = json.loads(line)
        prompts, max_tokens = request["prompts"], request["max_tokens"]
        start = time.perf_counter()
        answer = generate(prompts, max_tokens)
        seconds = time.perf_counter() - start
        wrong = [len(tokens) for tokens in answer["tokens"] if len(tokens) != max_tokens]
        assert len(answer["tokens"]) == len(prompts) and not wrong, f"not {max_tokens} tokens each: {wrong}"
        say(
            answer
            | {
                "seconds": seconds,
                "prompt_tokens": sum(map(len, prompts)),
                "generated_tokens": sum(map(len, answer["tokens"])),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
