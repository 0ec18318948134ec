"""Our SimPO update compared with TRL's and with one on Levanter's model, on SmolLM2-135M-Instruct in float32.

    uv run python benchmarks/training.py            # about 25 minutes on 2 cores; the first time it builds the peers
    uv run python benchmarks/training.py --rounds 1 --updates 1 --workloads D --peers trl

Workload D is 4 pairs of 256 tokens per sequence; E is 8 pairs with the lengths of real ones (UltraFeedback in English,
those that fit 512 tokens, evenly spread). All pairs are random tokens, because their content does not affect the cost.
In every round, each contestant in turn is started, makes one uncounted update (it compiles), then `--updates` counted
ones, and exits, so that none uses memory while another works. Peers have their own environments with exact pins, made
on first use.

It prints tables of medians, then ratios, and one JSON line; progress goes to stderr. It also writes one file
per workload to benchmarks/results/.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from inference_files import CACHE, environment, model_folder
from inference_report import print_lines
from machine import THREADS, busy_seconds, machine
from result_files import write_result

from simpo_pipeline.model.hf_weights import load_config

HERE = pathlib.Path(__file__).resolve().parent
LOGS = CACHE / "logs"
OURS = "ours"
PEERS = {"trl": "trl_simpo.py", "levanter": "levanter_simpo.py"}
VOCABULARY = 49152
# (prompt, chosen answer, rejected answer) of each pair, in tokens.
WORKLOADS: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "D": [(128, 128, 128)] * 4,
    "E": [
        *((330, 93, 76), (50, 456, 101), (46, 252, 48), (89, 423, 51)),
        *((52, 341, 116), (131, 222, 159), (130, 84, 343), (76, 251, 233)),
    ],
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A row of the table."""

    kind: str
    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def command(self) -> list[str]:
        """Return the command without the settings, after filling the environment if necessary."""
        if self.kind == OURS:
            return [sys.executable, str(HERE / "training_ours.py")]
        return [str(environment(self.kind)), "-E", str(HERE / "peers" / PEERS[self.kind])]


CONTESTANTS = (
    Contestant(OURS, "ours, packed", {"packing": True, "remat": "products"}),
    Contestant(OURS, "ours, padded", {"packing": False, "remat": "products"}),
    Contestant(OURS, "ours, packed, full remat", {"packing": True, "remat": "full"}),
    Contestant("trl", "TRL"),
    Contestant("levanter", "Levanter's model"),
)


def random_pairs(shape: Sequence[tuple[int, int, int]]) -> list[tuple[list[int], list[int], int]]:
    """Return pairs of these lengths, the same for all contestants."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, VOCABULARY, count).tolist()

    pairs = []
    for prompt_len, chosen_len, rejected_len in shape:
        prompt = tokens(prompt_len)
        pairs.append((prompt + tokens(chosen_len), prompt + tokens(rejected_len), prompt_len))
    return pairs


def train(entry: Contestant, pairs: list[Any], num_updates: int, log: pathlib.Path) -> dict[str, Any]:
    """Start the contestant, let it make its updates, and end it."""
    settings = {"model": str(model_folder()), "threads": THREADS, "pairs": pairs, **entry.settings}
    command = [*entry.command(), json.dumps(settings)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
    assert process.stdin is not None and process.stdout is not None
    answers: list[dict[str, Any]] = []
    try:
        versions = _answer(process, entry, log)["versions"]
        for _ in range(1 + num_updates):
            busy = busy_seconds()
            process.stdin.write("{}\n")
            answers.append(_answer(process, entry, log))
            answers[-1]["busy_cpus"] = (busy_seconds() - busy) / answers[-1]["seconds"]
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
    return {"versions": versions, "answers": answers}


def _answer(process: "subprocess.Popen[str]", entry: Contestant, log: pathlib.Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{entry.name} ended with {process.wait()}; see {log}")
    return json.loads(line)


def run_in_turn(
    entries: Sequence[Contestant], pairs: list[Any], num_rounds: int, num_updates: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the results of each contestant by name, one per round."""
    LOGS.mkdir(parents=True, exist_ok=True)
    said: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in entries}
    for number in range(num_rounds):
        for entry in entries:
            log = LOGS / f"training_{entry.name}.log".replace(" ", "_")
            one = train(entry, pairs, num_updates, log)
            said[entry.name].append(one)
            seconds = ", ".join(f"{answer['seconds']:.1f}" for answer in one["answers"])
            print(f"round {number + 1}: {entry.name}: {seconds} s, the first not counted", file=sys.stderr)
    return said


def row_of(entry: Contestant, said: list[dict[str, Any]], num_tokens: int, num_parameters: int) -> dict[str, Any]:
    """Return a row of the table: medians over all counted updates of all rounds."""
    counted = [answer for one in said for answer in one["answers"][1:]]
    seconds = [answer["seconds"] for answer in counted]
    middle = statistics.median(seconds)
    return {
        "trainer": entry.name,
        "kind": entry.kind,
        "seconds an update": middle,
        "fastest and slowest, seconds": [min(seconds), max(seconds)],
        "tok/s": num_tokens / middle,
        "FLOP/s as 6*N*tokens": 6 * num_parameters * num_tokens / middle,
        "peak RSS bytes": max(answer["peak_rss_bytes"] for answer in counted),
        "first loss": said[0]["answers"][0]["loss"],
        "CPUs busy": statistics.median(answer["busy_cpus"] for answer in counted),
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| trainer | s an update (range) | tok/s | GFLOP/s as 6*N*tokens | peak RSS | loss of the first |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        fastest, slowest = row["fastest and slowest, seconds"]
        print(
            f"| {row['trainer']} | {row['seconds an update']:.2f} ({fastest:.2f} to {slowest:.2f}) "
            f"| {row['tok/s']:,.0f} | {row['FLOP/s as 6*N*tokens'] / 1e9:,.0f} "
            f"| {row['peak RSS bytes'] / 1e9:.2f} GB | {row['first loss']:.5f} |"
        )
    print()


def compare(name: str, arguments: argparse.Namespace, num_parameters: int) -> dict[str, Any]:
    """Run one workload; print and return rows and ratios."""
    pairs = random_pairs(WORKLOADS[name])
    entries = [entry for entry in CONTESTANTS if entry.kind in (OURS, *arguments.peers)]
    said = run_in_turn(entries, pairs, arguments.rounds, arguments.updates)
    num_tokens = sum(len(chosen) + len(rejected) for chosen, rejected, _ in pairs)
    rows = [row_of(entry, said[entry.name], num_tokens, num_parameters) for entry in entries]
    versions = {entry.kind: said[entry.name][0]["versions"] for entry in entries}
    print(
        f"Workload {name}: {len(pairs)} pairs, {num_tokens} tokens; medians of {arguments.rounds} rounds of "
        f"{arguments.updates} updates\n{json.dumps(versions)}\n"
    )
    print_table(rows)
    ours = [row for row in rows if row["kind"] == OURS]
    found = {
        f"{peer['trainer']} / {row['trainer']}, seconds an update": peer["seconds an update"] / row["seconds an update"]
        for peer in rows
        if peer["kind"] != OURS
        for row in ours
    }
    print_lines("Ratios", found)
    return {"tokens": num_tokens, "versions": versions, "rows": rows, "ratios": found}


def measured_ceilings() -> dict[str, float]:
    """Return the FLOP/s of XLA's float32 matmuls, of a cube and of the shapes of an update, from a separate process."""
    command = [sys.executable, str(HERE / "training_ceilings.py")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parsed_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of starts of each contestant")
    parser.add_argument("--updates", type=int, default=2, help="timed updates per start")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    return parser.parse_args()


def main() -> None:
    """Measure, then print."""
    arguments = parsed_arguments()
    # Inherited by every contestant, so that trainers that use all visible cores use as many as the others.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    result: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), end="\n\n")
    num_parameters = load_config(str(model_folder())).num_parameters
    before = measured_ceilings()
    result["workloads"] = {name: compare(name, arguments, num_parameters) for name in arguments.workloads}
    after = measured_ceilings()
    ceilings = {name: max(rate, after[name]) for name, rate in before.items()}
    print_lines("GFLOP/s of XLA's matmuls in float32", {name: rate / 1e9 for name, rate in ceilings.items()})
    for name, workload in result["workloads"].items():
        parts = {
            f"{row['trainer']} / {ceiling}": row["FLOP/s as 6*N*tokens"] / rate
            for row in workload["rows"]
            for ceiling, rate in ceilings.items()
        }
        print_lines(f"Workload {name}, 6*N*tokens a second as a part of the ceiling", parts)
        workload["of the ceiling"] = parts
    print(json.dumps(result | {"ceilings, FLOP/s": ceilings}))
    for name, workload in result["workloads"].items():
        write_result(f"training_{name}", result | {"workloads": {name: workload}, "ceilings, FLOP/s": ceilings})


if __name__ == "__main__":
    main()
