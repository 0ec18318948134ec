"""Every YAML file in the repository is valid: settings decode into their dataclass, data has no duplicate keys."""

import dataclasses
import pathlib
import runpy

import pytest

from experiments.schedule import TrainingPhase
from experiments.settings.command_line import read_settings
from experiments.settings.sample_lm_multihost import SampleLmMultihostConfig
from experiments.settings.train_simpo import TrainSimpoConfig
from simpo_pipeline.config_files.parse import load_yaml
from simpo_pipeline.executor.step import unwrap_versioned_value
from simpo_pipeline.inference.config import SamplingParams

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = pathlib.Path("experiments/configs")
NOT_OURS = ("runs", "wandb", "build", "dist")  # and every folder whose name starts with a dot

BASE = "simpo_ultrafeedback_llama3_8b_v5p_32.yaml"
M11 = "simpo_ultrafeedback_llama3_8b_v5p_32_m11_train2_infer128_train5.yaml"
M12 = "simpo_ultrafeedback_llama3_8b_v5p_32_m12_train200_infer1024_every50.yaml"
M10_128 = "sample_llama8b_multihost_real_128prompts_2048_m10_hostdp_wandb_v5p32.yaml"
M10_1024 = "sample_llama8b_multihost_real_1024prompts_2048_m10_hostdp_wandb_v5p32.yaml"
ONE_PROMPT = "sample_llama8b_multihost_real_1prompt_2048.yaml"
NAMED_BY_USERS = (BASE, M11, M12, M10_128, M10_1024, ONE_PROMPT, "sample_smollm2_1prompt.yaml")


def yaml_files() -> list[pathlib.Path]:
    found = [path.relative_to(ROOT) for ending in ("yaml", "yml") for path in ROOT.rglob(f"*.{ending}")]
    return sorted(path for path in found if not any(part[0] == "." or part in NOT_OURS for part in path.parts))


def read_run(name: str) -> TrainSimpoConfig:
    return read_settings(TrainSimpoConfig, str(ROOT / CONFIGS / name), [])


def read_sampler(name: str) -> SampleLmMultihostConfig:
    return read_settings(SampleLmMultihostConfig, str(ROOT / CONFIGS / name), [])


@pytest.mark.parametrize("path", yaml_files(), ids=str)
def test_every_yaml_in_the_repository_decodes(path):
    if path.parent != CONFIGS:
        assert load_yaml((ROOT / path).read_text(), str(path)) is not None
    elif path.name.startswith("sample_"):
        read_sampler(path.name)
    else:
        read_run(path.name)


def test_the_files_that_users_know_exist():
    assert set(NAMED_BY_USERS) <= {path.name for path in yaml_files() if path.parent == CONFIGS}


def test_m11_resolves_to_the_run_of_record():
    settings = read_run(M11)
    generation = settings.build_generation("model")
    assert generation is not None
    assert settings.phases() == (TrainingPhase(0, 2, infer=True), TrainingPhase(2, 7, infer=False))
    assert dataclasses.asdict(settings.build_trainer()) == {
        "num_train_steps": 7,
        "train_batch_size": 128,
        "train_seq_len": 4096,
        "seed": 0,
        "compute_dtype": "bfloat16",
        "packing": False,
        "grad_accumulation": 1,
        "remat": "full",
        "logprob_chunk_size": 4096,
        "ema_decay": None,
        "simpo": {
            "beta": 1.0,
            "gamma_beta_ratio": 0.5,
            "loss_type": "sigmoid",
            "label_smoothing": 0.0,
            "sft_weight": 0.0,
            "z_loss_weight": 0.0,
        },
        "optimizer": {
            "learning_rate": 6e-7,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "max_grad_norm": 1.0,
            "warmup": 0.1,
            "lr_schedule": "cosine",
            "min_lr_ratio": 0.0,
            "decay": 0.2,
            "moment_dtype": "float32",
        },
    }
    assert dataclasses.asdict(generation.prompts) == {
        "prompts": (),
        "prompts_path": None,
        "synthetic_prompt_count": 128,
        "synthetic_prompt_template": "M11 prompt {index}: explain one practical ML idea in concise terms.",
    }
    assert generation.sampling == SamplingParams(max_tokens=2048, temperature=0.7)
    assert dataclasses.asdict(generation.engine) == {
        "max_seqs": 64,
        "max_seq_len": 4096,
        "page_size": 128,
        "num_pages": 1088,
        "prefill_chunk_tokens": 4096,
        "decode_steps_per_call": 64,
        "memory_utilization": 0.9,
    }
    assert (generation.mode, generation.chat) == ("host_data_parallel", False)
    assert generation.compute_dtype == "bfloat16"
    (component,) = settings.data.components.values()
    assert dataclasses.asdict(component.source.preference_source()) == {
        "path": "HuggingFaceH4/ultrafeedback_binarized",
        "split": "train_prefs",
        "revision": "3949bf5",
    }
    assert (component.too_long, settings.data.tokenizer) == ("raise", "marin-community/marin-tokenizer")
    assert settings.model_source == "meta-llama/Llama-3.1-8B"
    assert settings.model.stated_shape() == {
        "max_seq_len": 4096,
        "hidden_dim": 4096,
        "intermediate_dim": 14336,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "rope.type": "llama3",
    }
    assert dataclasses.asdict(settings.trainer.tracker) == {
        "type": "wandb",
        "project": "dpo",
        "name": "simpo_llama3_8b_m11_train2_infer128_train5",
    }


def test_m11_is_the_preset_of_the_main_experiment():
    preset = runpy.run_path(str(ROOT / "experiments" / "m11_interleave.py"))["PRESETS"]["llama3_8b_v5p_32"]
    settings = read_run(M11)
    generation = settings.build_generation("model")
    assert generation is not None
    assert preset.trainer == settings.build_trainer()
    for name in ("prompts", "sampling", "engine", "chat"):
        assert getattr(preset, name) == unwrap_versioned_value(getattr(generation, name)), name
    assert preset.trainer.compute_dtype == unwrap_versioned_value(generation.compute_dtype)


def test_m12_generates_after_every_50_updates_including_once_after_the_last():
    assert read_run(M12).phases() == tuple(TrainingPhase(stop - 50, stop, infer=True) for stop in (50, 100, 150, 200))


def test_the_base_run_is_one_phase_of_2150_updates():
    assert read_run(BASE).phases() == (TrainingPhase(0, 2150, infer=False),)


@pytest.mark.parametrize(("name", "num_prompts"), [(M10_128, 128), (M10_1024, 1024), (ONE_PROMPT, 1)])
def test_the_samplers_of_record_generate_2048_tokens_for_each_prompt(name, num_prompts):
    generation = read_sampler(name).build_generation("model")
    assert (generation.prompts.count, generation.sampling.max_tokens) == (num_prompts, 2048)
    assert generation.compute_dtype == "bfloat16"
