"""A sampler's settings file becomes the config of one generation step, or an error that names the knob and the fix."""

from typing import Any

import pytest
import yaml

from experiments.settings.sample_lm_multihost import SampleLmMultihostConfig
from simpo_pipeline.config_files.decode import decode_yaml
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from steps.infer import InferConfig


def settings_with(**changes: Any) -> SampleLmMultihostConfig:
    raw = {"hf_checkpoint": "some/model", "prompts": ["hello", "world"], **changes}
    return decode_yaml(SampleLmMultihostConfig, yaml.safe_dump(raw), source="s.yaml")


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        settings_with(**changes)
    return str(refused.value)


def test_every_knob_reaches_the_generation_step():
    settings = settings_with(
        trainer={"mp": "p=bfloat16,c=bfloat16"},
        engine=dict(max_seq_len=64, page_size=8, max_pages=20, max_seqs=2, max_prefill_size=32, max_rounds=4),
        **dict(max_new_tokens=16, temperature=0.0, top_p=0.9, seed=5, n_generations=3),
        **dict(inference_mode="host_data_parallel", chat=True, stop_sequence="."),
    )
    assert settings.build_generation("model") == InferConfig(
        prompts=PromptsConfig(prompts=("hello", "world")),
        sampling=SamplingParams(max_tokens=16, temperature=0.0, top_p=0.9, seed=5, n=3, stop=(".",)),
        engine=EngineConfig(
            max_seqs=2, max_seq_len=64, page_size=8, num_pages=20, prefill_chunk_tokens=32, decode_steps_per_call=4
        ),
        model_path="model",
        chat=True,
        mode="host_data_parallel",
        compute_dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hf_checkpoint=""), "Must specify hf_checkpoint"),
        (dict(prompts=[]), "prompts must be non-empty"),
        (dict(prompts=["hello", " "]), "prompts[1] is empty"),
        (dict(synthetic_prompt_count=3), "exactly one of prompts, prompts_path and synthetic_prompt_count"),
        (dict(stop_sequence=""), "stop_sequence must be non-empty if provided; set it to null for none"),
        (dict(n_generations=0), "n_generations must be >= 1, got 0"),
        (dict(inference_mode="x"), "Unknown inference_mode='x'. Expected one of: host_data_parallel, global_mesh"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(engine={"max_seq_len": 192}), "engine.max_seq_len is too small: it is 192"),
        (dict(engine={"max_pages": 7}), "engine.max_pages=7 is too small for one sequence"),
        (dict(engine={"page_size": None, "max_pages": 7}), "engine.max_pages is 7, but engine.page_size is null"),
        (dict(engine={"page_size": 0}), "engine.page_size must be positive when set, got 0"),
        (dict(engine={"max_rounds": 1025}), "engine.max_rounds must be <= engine.max_seq_len, got 1025 > 1024"),
        (dict(trainer={"mp": "int8"}), "trainer.mp is 'int8'"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_runs(changes, message):
    error = refusal(**changes)
    assert error.startswith("s.yaml: ") and message in error


def test_sizes_of_the_first_attempt_need_no_guard_on_many_hosts():
    """Leave out sizes that were guessed from each host's free memory, or that had to cover all prompts at once."""
    settings = settings_with(
        synthetic_prompt_count=1000, prompts=None, engine={"max_seqs": 2}, inference_mode="host_data_parallel"
    )
    engine = settings.build_generation("model").engine
    # max_pages and max_prefill_size may be left out: the hosts agree on values derived from all prompts and memories.
    assert (engine.num_pages, engine.prefill_chunk_tokens) == (None, EngineConfig().prefill_chunk_tokens)
    # max_seqs need not cover the prompts, nor a prefill their lengths: the other prompts wait, and none is dropped.
    assert settings.build_prompts().count == 1000 > (engine.max_seqs or 0)


def test_every_size_may_be_left_to_the_engine():
    settings = settings_with(engine={"max_seq_len": None, "page_size": None, "max_seqs": None})
    assert settings.build_generation("model").engine == EngineConfig()


def test_a_file_without_a_model_is_refused():
    with pytest.raises(ConfigError, match=r"^s\.yaml: hf_checkpoint is missing; give text\.$"):
        decode_yaml(SampleLmMultihostConfig, "prompts: [hello]", source="s.yaml")
