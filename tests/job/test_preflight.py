"""The flag `--preflight` where it must be refused, and the plan that it makes from a preset."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.job.preflight_job import PreflightFlags, PreflightJob
from simpo_pipeline.job.preflight_plan import Plan
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.preflight.topology import find_topology
from simpo_pipeline.training.config import TrainerConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOB = PreflightJob(
    model=LlamaConfig(64, 128, 2, 4, 2, 16, 264, 512),
    trainer=TrainerConfig(num_train_steps=7, train_batch_size=8, train_seq_len=384),
    prompts=PromptsConfig(synthetic_prompt_count=128, synthetic_prompt_template="Prompt {index}."),
    sampling=SamplingParams(max_tokens=16),
    engine=EngineConfig(),
    engine_dtype="float32",
)


def run_m11(*flags: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(ROOT / "experiments" / "m11_interleave.py"), *flags]
    return subprocess.run(script, capture_output=True, text=True, cwd=ROOT)


def test_an_unknown_topology_is_a_usage_error_before_anything_runs(tmp_path):
    done = run_m11("--preflight", "v5p-33", "--prefix", str(tmp_path))
    assert done.returncode == 2
    assert "error: --preflight 'v5p-33' is not a known topology; give one of v5p-16, v5p-32" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the compiler for TPUs is installed")
def test_without_the_compiler_the_extra_is_named(tmp_path):
    done = run_m11("--preset", "tiny", "--preflight", "v5p-16", "--prefix", str(tmp_path))
    assert done.returncode == 2
    assert "the extra `tpu`: uv run --isolated --extra tpu python ..." in done.stderr


def test_the_flags_accept_every_known_topology():
    assert PreflightFlags(preflight="v6e-16").preflight == "v6e-16"
    with pytest.raises(ConfigError):
        PreflightFlags(preflight="v6e-17")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "set `llama` in the preset"),
        ({"trainer": dataclasses.replace(JOB.trainer, packing=True)}, "with packing off"),
    ],
    ids=["no shape", "packed rows"],
)
def test_a_job_whose_shapes_are_not_known_in_advance_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(dataclasses.replace(JOB, **changes), find_topology("v5p-32"), [])
