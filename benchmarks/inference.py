"""Our engine compared with those in use today, in turn, on SmolLM2-135M-Instruct.

    uv run python benchmarks/inference.py          # about 45 minutes on 2 cores; the first time it builds the peers
    uv run python benchmarks/inference.py --rounds 1 --num_prompts 4 --max_tokens 8      # check that everything runs

Each contestant is a separate process with 2 threads (`inference_ours.py`, `peers/`). Peers have their own environments
with exact pins, which are made on first use, as is the model. All contestants start, warm up on the workload itself,
and then take turns for `--rounds` rounds; while one works, the others sleep. Decoding is greedy and ignores end
tokens, so that all do the same work: workload A is 128 chat prompts with 64 new tokens each, B 32 with 512, C 32 with
64. The speed of XLA's matmuls is measured before and after, and the better of the two is the ceiling.

It prints tables of medians, then ratios, and one JSON line; progress goes to stderr. Full-size runs also write
one file per workload to benchmarks/results/.
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
from result_files import write_result

from simpo_pipeline.model.hf_weights import load_config

CEILINGS = pathlib.Path(__file__).resolve().parent / "inference_ceilings.py"
LOGS = CACHE / "logs"
DTYPES = ("float32", "bfloat16")
# Batch size of the runs of our engine alone.
BATCH = 128

Rates = dict[str, dict[str, float]]


def measured_ceilings(*, small: bool) -> Rates:
    """Return the FLOP/s of XLA's matmuls by dtype and shape, measured in a separate process."""
    command = [sys.executable, str(CEILINGS), *(["--small"] if small else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def better(first: Rates, second: Rates) -> Rates:
    """Return the higher rate of each."""
    return {
        dtype: {name: max(rate, second[dtype][name]) for name, rate in rates.items()} for dtype, rates in first.items()
    }


def compare(name: str, workload: Workload, peers: list[str], num_rounds: int) -> dict[str, Any]:
    """Run one workload on all contestants in turn; print and return rows, ratios and agreement."""
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
    """Return the answers of our engine, one per workload, after an uncounted call with the first workload."""
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
    """Return our generated tokens per second for increasing numbers of prompts at one batch size, one call each."""
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
    """Return the share of wall time that our engine's host spends on scheduling, with a tiny, inexpensive model."""
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
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each contestant")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--scaling", action="store_true", help="also run ours alone with 128, 512 and 2,048 prompts")
    parser.add_argument(
        "--host", action="store_true", help="also measure the host's share of the wall time, with ours on a tiny model"
    )
    parser.add_argument("--num_prompts", type=int, help="use fewer prompts everywhere, to check that everything runs")
    parser.add_argument("--max_tokens", type=int, help="use fewer new tokens, likewise")
    return parser.parse_args()


def main() -> None:
    """Measure, then print."""
    arguments = parsed_arguments()

    def shrunk(workload: Workload) -> Workload:
        return Workload(arguments.num_prompts or workload.num_prompts, arguments.max_tokens or workload.max_tokens)

    # Inherited by every contestant, so that engines that use all visible cores use as many as the others.
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
    if arguments.num_prompts is None and arguments.max_tokens is None:
        shared = {"machine": result["machine"], "ceilings, FLOP/s": ceilings}
        for name, workload in compared.items():
            write_result(f"inference_{name}", shared | {"workloads": {name: workload}})
        for name in ("scaling", "host"):
            if name in result:
                write_result(f"inference_{name}", shared | {name: result[name]})


if __name__ == "__main__":
    main()
