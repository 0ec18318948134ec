"""The in-process handoff against what users do today: save, start a fresh process, load, compile.

    uv run python benchmarks/handoff.py            # SmolLM2-135M, about 3 minutes on 2 cores

Everything is timed in one run, ours and the detour in turn; medians of `ROUNDS`. The detour is kept as short as it
can be: safetensors written from host memory (no checkpoint library), the page cache still warm. Prints a table and
one JSON line.
"""

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
from safetensors.numpy import save_file

from simpo_pipeline.distributed.mesh import local_mesh, training_mesh
from simpo_pipeline.distributed.programs import Programs
from simpo_pipeline.handoff.handoff import build_handoff
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.inference.engine import Engine
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.hf_weights import load_config, load_weights, save_weights
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, abstract_llama
from simpo_pipeline.training.config import TrainerConfig
from simpo_pipeline.training.trainer import Trainer
from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model

ROUNDS = 5
ENGINE = EngineConfig(max_seqs=8, max_seq_len=128)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of one call, device work included."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def bytes_written() -> int:
    """Bytes that this process has passed to write calls so far, as Linux counts them."""
    fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def wanted_weights(model_path: str, dtype: str) -> Llama:
    """The abstract weights of an engine on this process's devices."""
    return with_shardings(
        abstract_llama(load_config(model_path), jnp.dtype(dtype)), local_mesh(), TENSOR_PARALLEL_RULES
    )


def save_state(trainer: Trainer, path: str) -> None:
    """The whole train state (fp32 parameters and both moments) as one safetensors file."""
    leaves = {str(index): np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(trainer.state))}
    save_file(leaves, path)


def generate_after_loading(model_path: str) -> None:
    """The fresh process of the detour: load, compile, first batch; prints its own seconds as JSON."""
    start = time.perf_counter()
    weights = load_weights(model_path, wanted_weights(model_path, "float32"))
    jax.block_until_ready(weights)
    loaded = time.perf_counter()
    engine = Engine(load_config(model_path), ENGINE, local_mesh(), Programs(), "float32")
    compiled = time.perf_counter()
    sampling = SamplingParams(max_new_tokens=4, temperature=0.0)
    requests = [Request(tuple(range(10, 30)), index, 0, sampling) for index in range(8)]
    engine.generate(weights, requests, step=0)
    done = time.perf_counter()
    print(json.dumps({"load": loaded - start, "compile": compiled - loaded, "first_batch": done - compiled}))
