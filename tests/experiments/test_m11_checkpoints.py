"""M11 on two processes, killed in its second phase, resumes from a checkpoint and exports its weights."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from simpo_pipeline.model.hf_weights import load_config, load_weights
from simpo_pipeline.model.transformer import abstract_llama

pytestmark = pytest.mark.slow

M11 = "experiments/m11_interleave.py"
# The job is this short, so every update has to be written.
EVERY = ("--checkpoint.when", "every", "--checkpoint.every", 1)


def output(prefix: pathlib.Path, step: str) -> pathlib.Path:
    (folder,) = prefix.glob(f"{step}-*")
    return folder


def digest(prefix: pathlib.Path, step: str) -> str:
    return json.loads((output(prefix, step) / "summary.json").read_text())["state_digest"]


def test_a_job_killed_in_update_4_resumes_from_update_3_to_the_same_digest(launch, tmp_path):
    count = 2
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(count, M11, "--preset", "tiny", "--prefix", whole, "--export", "fp32").require_success()
    fault = ("kill", "train", count - 1, "--preset", "tiny", "--prefix", killed, *EVERY)
    assert launch(count, "tests/experiments/m11_with_fault.py", *fault).exit_code != 0
    handed_on = list((output(killed, "train-2") / ".checkpoints").glob("00000002-*.json"))
    assert len(handed_on) == 1
    again = launch(count, M11, "--preset", "tiny", "--prefix", killed, *EVERY, "--export", "fp32").require_success()
    # The replay of train-2 computes nothing, and train-5 at most the updates that were not written yet.
    lines = [line for line in again.lines(0) if "INFO step" in line]
    assert 4 <= len(lines) <= 5, again.text
    # The checkpoint of update 3 may have been incomplete when the kill came.
    assert again.text.count("resumed from checkpoint") == count * (1 + (len(lines) == 4)), again.text
    assert digest(killed, "train-5") == digest(whole, "train-5")
    losses = [(output(prefix, "train-5") / "metrics.jsonl").read_text().count("\n") for prefix in (whole, killed)]
    assert losses == [5, 5]
    for step in ("train-2", "train-5"):
        folder = output(killed, step) / ".checkpoints"
        assert not folder.exists() or not list(folder.iterdir())
    one, other = ((output(prefix, "export") / "model.safetensors").read_bytes() for prefix in (whole, killed))
    assert one == other
    path = str(output(killed, "export"))
    loaded = load_weights(path, abstract_llama(load_config(path), jnp.float32))
    assert np.isfinite(np.asarray(loaded.embedding.array)).all()
