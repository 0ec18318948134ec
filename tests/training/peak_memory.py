"""Run updates, and print the memory that the compiler announced and their peak memory, in bytes, as one line of JSON.

    python tests/training/peak_memory.py packed|padded none|products|full small|smollm2

A separate script, started by test_peak_memory.py: a process has one peak, which the compiler must not raise.
"""

import ctypes
import json
import pathlib
import resource
import sys
import time

import jax
import numpy as np

from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.distributed.mesh import training_mesh
from simpo_pipeline.distributed.programs import Programs, forbid_strays
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.training.config import OptimizerConfig, TrainerConfig
from simpo_pipeline.training.step import build_train_step
from simpo_pipeline.training.trainer import Trainer

MODELS = {
    "small": LlamaConfig(384, 1024, 8, 6, 6, 64, 16384, 512, tie_word_embeddings=True),
    # The shape of SmolLM2-135M.
    "smollm2": LlamaConfig(576, 1536, 30, 9, 3, 64, 49152, 2048, tie_word_embeddings=True),
}
NUM_PAIRS, PROMPT, ANSWER = 4, 128, 128


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the peak resident memory since the last reset, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def random_pair(rng: np.random.Generator, number: int, vocab_size: int) -> TokenizedPair:
    prompt = rng.integers(0, vocab_size, PROMPT)
    answers = rng.integers(0, vocab_size, (2, ANSWER))
    chosen, rejected = (np.concatenate([prompt, answer]).astype(np.int32) for answer in answers)
    return TokenizedPair(str(number), chosen, rejected, PROMPT, PROMPT)


def main() -> None:
    forbid_strays()
    rng, programs, mesh, model = np.random.default_rng(0), Programs(), training_mesh(), MODELS[sys.argv[3]]
    config = TrainerConfig(
        num_train_steps=3,
        train_batch_size=NUM_PAIRS,
        train_seq_len=PROMPT + ANSWER,
        packing=sys.argv[1] == "packed",
        remat=sys.argv[2],
        optimizer=OptimizerConfig(warmup=0),
    )
    trainer = Trainer.start_random(config, model, programs=programs, mesh=mesh)
    loader = PairLoader(
        pairs=[random_pair(rng, number, model.vocab_size) for number in range(NUM_PAIRS)],
        batch_size=NUM_PAIRS,
        seq_len=PROMPT + ANSWER,
        seed=0,
        pad_id=0,
        num_updates=3,
        packing=config.packing,
        num_groups=trainer.num_groups,
    )
    # Equal programs are compiled once, so the trainer gets exactly this one.
    program = build_train_step(programs, model, config, mesh, loader.shape)
    stated = program.memory_bytes
    # The first update also loads the other programs, whose memory the compiler of this one does not count.
    trainer.train_until(1, loader, lambda step, metrics: None)
    jax.block_until_ready(trainer.state)
    # An update's temporaries are freed a moment after its results are ready.
    time.sleep(0.5)
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    # The state is resident already, and the compiler counts it too.
    before = resident_bytes() - stated.aliased
    trainer.train_until(3, loader, lambda step, metrics: None)
    print(json.dumps({"announced": stated.peak, "taken": peak_bytes() - before}))


if __name__ == "__main__":
    main()
