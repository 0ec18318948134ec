"""Our engine against those that people use today, in turn, on SmolLM2-135M-Instruct.

    uv run python benchmarks/inference.py          # about 45 minutes on 2 cores; the first time it builds the peers
    uv run python benchmarks/inference.py --rounds 1 --num_prompts 4 --max_tokens 8      # only whether all of it runs

Each contestant is a process of its own with 2 threads (`inference_ours.py`, `peers/`); peers have environments of
their own, with exact pins, which are made on first use, as is the model. All start, warm up on the workload itself,
and then take turns for `--rounds` rounds; while one works the others sleep. Everything is greedy and ignores ends, so
that all do the same work: A is 128 chat prompts with 64 new tokens each, B 32 with 512, C 32 with 64. The speed of
XLA's matrix products is measured before and after, and the better of the two is the ceiling.

Prints tables of medians, then ratios, and one JSON line; progress goes to stderr.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from inference_contestants import OURS, PEERS, THREADS, Contestant, Process, contestants, run_in_turn
from inference_files import CACHE, model_folder, tiny_model_folder
from inference_report import agreement, ceiling_fractions, figures_of, print_lines, print_table, ratios
from inference_workloads import SCALING, WORKLOADS, Workload, encoded_prompts
from machine import machine

from simpo_pipeline.model.hf_weights import load_config

CEILINGS = pathlib.Path(__file__).resolve().parent / "inference_ceilings.py"
LOGS = CACHE / "logs"
DTYPES = ("float32", "bfloat16")
# Of the runs of our engine alone.
BATCH = 128

Rates = dict[str, dict[str, float]]


def measured_ceilings(*, small: bool) -> Rates:
    """Operations a second of XLA's matrix products, by dtype and shape; in a process that then goes."""
    command = [sys.executable, str(CEILINGS), *(["--small"] if small else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def better(first: Rates, second: Rates) -> Rates:
    """The higher rate of each."""
    return {
        dtype: {name: max(rate, second[dtype][name]) for name, rate in rates.items()} for dtype, rates in first.items()
    }


def compare(name: str, workload: Workload, peers: list[str], num_rounds: int) -> dict[str, Any]:
    """One workload in turn: rows, ratios and agreement, printed and returned."""
    model = model_folder()
    prompts = encoded_prompts(model, workload.num_prompts)
    entries = contestants(name, workload.num_prompts, peers)
    answers, versions = run_in_turn(entries, prompts, workload, num_rounds, model, LOGS)
    rows = [figures_of(entry, answers[entry.label]) for entry in entries]
    num_tokens = sum(map(len, prompts))
    sizes = f"{workload.num_prompts} prompts ({num_tokens} tokens) x {workload.max_tokens} new tokens"
    stated = "; ".join(
        f"{kind}: {', '.join(f'{package} {version}' for package, version in packages.items())}"
        for kind, packages in versions.items()
    )
    print(f"Workload {name}: {sizes}, medians of {num_rounds} rounds\n{stated}\n")
    print_table(rows)
    found, same = ratios(rows), agreement(entries, answers)
    print_lines("Ratios", found)
    print_lines("Prompts answered with exactly our tokens in float32", same)
    return {
        "prompts": workload.num_prompts,
        "prompt tokens": num_tokens,
        "new tokens a prompt": workload.max_tokens,
        "versions": versions,
        "rows": rows,
        "ratios": found,
        "agreement": same,
    }


def serve_alone(
    dtype: str, model: pathlib.Path, prompts: list[list[int]], workloads: list[Workload]
) -> list[dict[str, Any]]:
    """Answers of our engine, one a workload, after one to the first that is not counted."""
    LOGS.mkdir(parents=True, exist_ok=True)
    entry = Contestant(OURS, "ours", dtype, min(BATCH, len(prompts)))
    with (LOGS / f"alone_{dtype}.log").open("w") as log:
        process = Process(entry, prompts, max(workload.max_tokens for workload in workloads), model, log)
    try:
        calls = [workloads[0], *workloads]
        return [process.ask(prompts[: workload.num_prompts], workload.max_tokens) for workload in calls][1:]
    finally:
        process.close()


def scaling(workloads: list[Workload]) -> dict[str, float]:
    """Our generated tokens a second for ever more prompts at one batch, one call each."""
    model = model_folder()
    prompts = encoded_prompts(model, workloads[-1].num_prompts)
    found: dict[str, float] = {}
    for dtype in DTYPES:
        for workload, answer in zip(workloads, serve_alone(dtype, model, prompts, workloads), strict=True):
            rate = answer["generated_tokens"] / answer["seconds"]
            found[f"{dtype}, {workload.num_prompts} prompts x {workload.max_tokens}, tok/s"] = rate
        rates = [rate for name, rate in found.items() if name.startswith(f"{dtype},")]
        found[f"{dtype}, fastest / slowest"] = max(rates) / min(rates)
    print_lines(f"Scaling of ours, batch {BATCH}", found)
    return found


def host_share(workload: Workload, num_rounds: int) -> dict[str, Any]:
    """What part of the wall our engine's host spends on scheduling, where the model is tiny and costs nothing."""
    model = tiny_model_folder()
    prompts = encoded_prompts(model, workload.num_prompts)
    answers = serve_alone("float32", model, prompts, [workload] * num_rounds)

    def share(name: str) -> float:
        return statistics.median(answer[name] / answer["seconds"] for answer in answers)

    found = {
        "prompts": workload.num_prompts,
        "generated tok/s": statistics.median(answer["generated_tokens"] / answer["seconds"] for answer in answers),
        "wall seconds": statistics.median(answer["seconds"] for answer in answers),
        "scheduling / wall": share("scheduling_seconds"),
        "all that the host does while devices wait / wall": share("host_seconds"),
    }
    print_lines(f"Ours on a tiny model, batch {BATCH}, {workload.max_tokens} new tokens", found)
    return found


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each contestant")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--scaling", action="store_true", help="also ours alone at 128, 512 and 2,048 prompts")
    parser.add_argument("--host", action="store_true", help="also the host's share of the wall, ours on a tiny model")
    parser.add_argument("--num_prompts", type=int, help="fewer prompts everywhere, to see whether all of it runs")
    parser.add_argument("--max_tokens", type=int, help="fewer new tokens, likewise")
    return parser.parse_args()


def main() -> None:
    """Measures, then prints."""
    arguments = parsed_arguments()

    def shrunk(workload: Workload) -> Workload:
        return Workload(arguments.num_prompts or workload.num_prompts, arguments.max_tokens or workload.max_tokens)

    # Inherited by every contestant: engines that take all cores they see take as many as the others.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    small = arguments.num_prompts is not None
    result: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), end="\n\n")
    ceilings = measured_ceilings(small=small)
    compared = {
        name: compare(name, shrunk(WORKLOADS[name]), arguments.peers, arguments.rounds)
        for name in arguments.workloads
        if name != "C" or "levanter" in arguments.peers
    }
    if arguments.scaling:
        result["scaling"] = scaling([shrunk(workload) for workload in SCALING])
    if arguments.host:
        result["host"] = host_share(shrunk(WORKLOADS["A"]), arguments.rounds)
    ceilings = better(ceilings, measured_ceilings(small=small))
    num_parameters = load_config(str(model_folder())).num_parameters
    for dtype, rates in ceilings.items():
        print_lines(f"GFLOP/s of XLA's products in {dtype}", {name: rate / 1e9 for name, rate in rates.items()})
    for name, workload in compared.items():
        workload["of the ceiling"] = ceiling_fractions(workload["rows"], ceilings, num_parameters)
        print_lines(f"Workload {name}, decoding as a part of the ceiling", workload["of the ceiling"])
    print(json.dumps(result | {"workloads": compared, "ceilings, FLOP/s": ceilings}))


if __name__ == "__main__":
    main()
