"""How a process that trains talks to the benchmark: one JSON object a line, requests in and answers out.

It is started with the path of a JSON file of settings: `model` (a folder), `threads`, and `pairs`, each a list of the
token ids of prompt and chosen answer, of prompt and rejected answer, and the length of the prompt. It says once that it
is ready; then each line asks for one update on these pairs. Standard library only: every environment imports it.
"""

import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """What every contestant does: SimPO as in the paper, AdamW, clipping by the global norm."""

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


RECIPE = Recipe()


class Pair(NamedTuple):
    """Token ids, and where the answers start."""

    chosen: list[int]
    rejected: list[int]
    start: int


# One update; its loss.
Update = Callable[[], float]


def peak_rss_bytes() -> int:
    """The most memory this process has had resident since its start, loading and compiling included."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def serve_updates(distributions: Sequence[str], load: Callable[[dict[str, Any], list[Pair]], Update]) -> None:
    """Loads, then makes an update for each line of its input; states the versions of `distributions`."""
    # Answers get a descriptor of their own: what libraries print goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    settings = json.loads(pathlib.Path(sys.argv[1]).read_text())
    update = load(settings, [Pair(*pair) for pair in settings["pairs"]])
    say({"versions": {name: importlib.metadata.version(name) for name in distributions}})
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = update()
        say({"seconds": time.perf_counter() - start, "loss": loss, "peak_rss_bytes": peak_rss_bytes()})
