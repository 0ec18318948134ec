"""A SimPO settings file becomes the configs of its steps, or an error that names the knob, the file and the fix."""

import pathlib
import runpy
from typing import Any

import pytest
import yaml

from experiments.schedule import TrainingPhase
from experiments.settings.train_simpo import TrainSimpoConfig
from simpo_pipeline.config_files.decode import decode_yaml
from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import output_path_of, unwrap_versioned_value
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.training.config import OptimizerConfig, SimpoConfig, TrainerConfig
from steps.infer import InferConfig

train_simpo_steps = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "experiments" / "train_simpo.py"))[
    "train_simpo_steps"
]


def settings_with(**changes: Any) -> TrainSimpoConfig:
    """Return a small run with some of its dotted keys set, or left out if the value is `...`."""
    text = """
        data:
          components:
            ours: {source: {type: url, train_urls: [pairs.jsonl]}}
        initialize_from_hf: some/model
        train_seq_len: 64
        trainer: {num_train_steps: 7, train_batch_size: 4}
        inference_eval: {enabled: true, eval_at_steps: [2], prompts: [hello], max_new_tokens: 16, max_seq_len: 64}
    """
    raw = yaml.safe_load(text)
    for key, value in changes.items():
        *folders, name = key.split("__")
        inner = raw
        for folder in folders:
            inner = inner.setdefault(folder, {})
        if value is ...:
            del inner[name]
        else:
            inner[name] = value
    return decode_yaml(TrainSimpoConfig, yaml.safe_dump(raw), source="run.yaml")


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        settings_with(**changes)
    return str(refused.value)


def test_every_knob_reaches_the_training_steps():
    settings = settings_with(
        trainer__seed=3,
        trainer__mp="p=f32,c=bfloat16",
        model__gradient_checkpointing=False,
        optimizer={"learning_rate": 1e-4, "warmup": 2, "lr_schedule": "linear"},
        beta=1.5,
        gamma_beta_ratio=0.3,
    )
    assert settings.build_trainer() == TrainerConfig(
        num_train_steps=7,
        train_batch_size=4,
        train_seq_len=64,
        seed=3,
        compute_dtype="bfloat16",
        remat="products",
        simpo=SimpoConfig(beta=1.5, gamma_beta_ratio=0.3),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=2.0, lr_schedule="linear"),
    )
    assert settings.phases() == (TrainingPhase(0, 2, infer=True), TrainingPhase(2, 7, infer=False))


def test_the_rest_of_the_loss_and_of_the_trainer_reaches_the_training_steps():
    settings = settings_with(
        **dict(loss_type="sigmoid", label_smoothing=0.1, sft_weight=0.2, z_loss_weight=1e-4),
        **dict(trainer__packing=True, trainer__grad_accumulation=2, trainer__ema_decay=0.99),
    )
    trainer = settings.build_trainer()
    assert trainer.simpo == SimpoConfig(label_smoothing=0.1, sft_weight=0.2, z_loss_weight=1e-4)
    assert (trainer.packing, trainer.grad_accumulation, trainer.ema_decay) == (True, 2, 0.99)


def test_several_datasets_become_separate_steps_read_by_weight():
    settings = settings_with(
        data__components=TWO_COMPONENTS,
        data__train_weights={"b": 3.0},
        validation_split_fraction=0.2,
        trainer__steps_per_eval=5,
        trainer__tensor_parallel=2,
    )
    steps = {step.name: step for step in train_simpo_steps(settings)}
    assert {"prepare_pairs-a", "prepare_pairs-b"} < set(steps)
    assert unwrap_versioned_value(steps["prepare_pairs-a"].config.validation_fraction) == 0.2
    config = steps["train-2"].config
    found = [(dataset.path, unwrap_versioned_value(dataset.weight)) for dataset in config.pairs_path]
    assert found == [(output_path_of(steps["prepare_pairs-a"]), 1.0), (output_path_of(steps["prepare_pairs-b"]), 3.0)]
    assert (unwrap_versioned_value(config.eval_every), config.tensor_parallel) == (5, 2)


def test_every_knob_reaches_the_generation_steps():
    settings = settings_with(
        trainer__mp="p=f32,c=bfloat16",
        inference_eval={
            **dict(enabled=True, eval_every=3, inference_mode="host_data_parallel", chat=True),
            **dict(synthetic_prompt_count=5, synthetic_prompt_template="number {index}"),
            **dict(max_new_tokens=16, temperature=0.5, top_p=0.9, seed=11),
            **dict(max_seq_len=64, page_size=8, max_pages=20, max_seqs=2, max_prefill_size=32, max_rounds=4),
        },
    )
    assert settings.build_generation("model") == InferConfig(
        prompts=PromptsConfig(synthetic_prompt_count=5, synthetic_prompt_template="number {index}"),
        sampling=SamplingParams(max_tokens=16, temperature=0.5, top_p=0.9, seed=11),
        engine=EngineConfig(
            max_seqs=2, max_seq_len=64, page_size=8, num_pages=20, prefill_chunk_tokens=32, decode_steps_per_call=4
        ),
        model_path="model",
        chat=True,
        mode="host_data_parallel",
        compute_dtype="bfloat16",
    )
    assert [phase.stop for phase in settings.phases() if phase.infer] == [3, 6]


def test_omitted_lengths_are_those_of_the_model():
    settings = settings_with(train_seq_len=..., model__max_seq_len=48, inference_eval__max_seq_len=None)
    generation = settings.build_generation("model")
    assert settings.build_trainer().train_seq_len == 48
    assert generation is not None and generation.engine.max_seq_len == 48


def test_omitted_sizes_are_left_to_the_engine():
    settings = settings_with(
        inference_eval__max_seq_len=None,
        inference_eval__page_size=None,
        inference_eval__prompts=...,
        inference_eval__prompts_path="prompts.txt",
    )
    generation = settings.build_generation("model")
    assert generation is not None and generation.engine == EngineConfig()


def test_without_inference_eval_a_run_is_one_phase():
    settings = settings_with(inference_eval=...)
    assert settings.phases() == (TrainingPhase(0, 7, infer=False),)
    assert settings.build_generation("model") is None


def test_a_hub_dataset_is_named_with_split_and_revision():
    source = {"type": "hf", "id": "some/pairs", "splits": ["train_prefs"], "revision": "abc"}
    settings = settings_with(data__components__ours__source=source, data__tokenizer="some/tokenizer")
    found = settings.data.components["ours"].source.preference_source()
    assert found == PreferenceSource("some/pairs", split="train_prefs", revision="abc")


def test_random_weights_need_a_whole_shape_and_get_the_byte_vocabulary():
    shape = dict(max_seq_len=64, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2)
    settings = settings_with(initialize_from_hf=False, model=shape)
    model = settings.model.random_model()
    assert (model.head_dim, model.vocab_size, model.rope_theta, model.rope_scaling) == (8, 261, 10_000.0, None)
    assert settings.model_source is None
    assert refusal(initialize_from_hf=False, model={**shape, "num_kv_heads": 3}) == (
        "run.yaml: model: num_heads (4) must be a multiple of num_kv_heads (3): "
        "each key/value head serves an equal group of query heads"
    )
    del shape["num_layers"]
    assert refusal(initialize_from_hf=False, model=shape).startswith("run.yaml: model.num_layers not set; set")


def test_llama3_rope_of_random_weights_has_the_factors_of_llama_3_1():
    shape = dict(max_seq_len=64, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2)
    model = settings_with(initialize_from_hf=False, model={**shape, "rope": {"type": "llama3"}}).model.random_model()
    scaling = model.rope_scaling
    assert scaling is not None and model.rope_theta == 500_000.0
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (8.0, 1.0, 4.0)
    assert scaling.original_max_seq_len == 8192


TWO_COMPONENTS = {name: {"source": {"type": "url", "train_urls": ["pairs.jsonl"]}} for name in ("a", "b")}
MISNAMED = {**TWO_COMPONENTS, "a/b": TWO_COMPONENTS["a"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_seq_len=0), "train_length must be positive, got 0"),
        (dict(train_seq_len=65, model__max_seq_len=64), "train_length (65) cannot exceed model max_seq_len (64)."),
        (dict(train_seq_len=...), "train_seq_len is missing"),
        (dict(validation_split_fraction=1.0), "validation_split_fraction must be in [0, 1), got 1.0"),
        (dict(validation_split_fraction=0.1), "no schedule for evaluating the held-out pairs; set trainer.steps_per"),
        (dict(trainer__steps_per_eval=5), "trainer.steps_per_eval is 5, but no pairs are held out"),
        (dict(trainer__steps_per_eval=0), "trainer.steps_per_eval must be positive, got 0"),
        (dict(trainer__tensor_parallel=0), "trainer.tensor_parallel must be positive, got 0"),
        (dict(trainer__grad_accumulation=3), "train_batch_size is 4 pairs and grad_accumulation 3"),
        (dict(loss_type="ipo"), "simpo.loss_type is 'ipo': give one of sigmoid, hinge"),
        (dict(loss_type="hinge", label_smoothing=0.1), "only the sigmoid loss supports it"),
        (dict(initialize_from_hf=True), "initialize_from_hf does not name a model"),
        (dict(beta=0.0), "simpo.beta is 0.0"),
        (dict(optimizer__learning_rate=-1.0), "optimizer.learning_rate is -1.0"),
        (dict(model__type="gpt2"), "model.type is 'gpt2'; only llama is supported"),
        (dict(model__rope={"type": "yarn"}), "model.rope.type is 'yarn'"),
        (dict(model__rope={"factor": 8.0}), "its type is default; set type: llama3"),
        (dict(trainer__num_train_steps=0), "trainer.num_train_steps must be positive, got 0"),
        (dict(trainer__train_batch_size=0), "trainer.train_batch_size must be positive, got 0"),
        (dict(trainer__mp="p=bfloat16,c=bfloat16"), "master weights are float32"),
        (dict(trainer__mp="f16"), "trainer.mp is 'f16'; write p=DTYPE,c=DTYPE"),
        (dict(trainer__tracker__type="tensorboard"), "expected one of wandb, jsonl, noop, none"),
        (dict(data__components={}), "data.components has no datasets"),
        (
            dict(data__components={**TWO_COMPONENTS, "a/b": TWO_COMPONENTS["a"]}),
            "data.components has a dataset named 'a/b'",
        ),
        (dict(data__train_weights={"ours": 1.0, "test": 0.0}), "data.train_weights sets test to 0.0"),
        (dict(data__train_weights={"ours": float("inf")}), "data.train_weights sets ours to inf"),
        (
            dict(data__components__ours__format={"type": "chat"}),
            "SimPO training requires preference_chat datasets. Component 'ours' has format chat",
        ),
        (
            dict(data__components__ours__format={"pack": True}),
            "Packed preference_chat datasets are not supported yet. Packed datasets: ours",
        ),
        (
            dict(data__components__ours__format={"slice_strategy": "left"}),
            "preference_chat slice_strategy must be one of raise, truncate, drop. Invalid datasets: ours (left)",
        ),
        (dict(data__components__ours__source={"type": "s3"}), "source.type is 's3'"),
        (dict(data__components__ours__source={"type": "url"}), "needs train_urls with exactly one path"),
        (dict(data__components__ours__source={"type": "hf", "id": "x"}), "splits with exactly one split"),
        (dict(inference_eval__eval_at_steps=[0]), "inference_eval.eval_at_steps must be positive, got 0"),
        (dict(inference_eval__eval_at_steps=[8]), "8, but the run has only 7 updates"),
        (dict(inference_eval__eval_at_steps=[]), "none of the 7 updates is followed by generation"),
        (dict(inference_eval__eval_at_steps=...), "inference_eval.eval_every to at most 7"),
        (
            dict(inference_eval__eval_at_steps=..., inference_eval__eval_every=0),
            "inference_eval.eval_every must be positive when eval_at_steps is unset, got 0",
        ),
        (
            dict(inference_eval__inference_mode="x"),
            "Unknown inference_eval.inference_mode='x'. Expected one of: host_data_parallel, global_mesh",
        ),
        (
            dict(inference_eval__prompts=[]),
            "inference_eval.prompts must be non-empty when prompts_path and synthetic_prompt_count are unset.",
        ),
        (dict(inference_eval__synthetic_prompt_count=3), "exactly one of prompts, prompts_path"),
        (
            dict(inference_eval__prompts=..., inference_eval__synthetic_prompt_count=0),
            "inference_eval.synthetic_prompt_count must be positive, got 0",
        ),
        (dict(inference_eval__max_new_tokens=0), "inference_eval.max_new_tokens must be at least 1, got 0"),
        (dict(inference_eval__temperature=-1.0), "inference_eval.temperature must be a finite number"),
        (dict(inference_eval__max_new_tokens=64), "inference_eval.max_seq_len is too small: it is 64"),
        (dict(inference_eval__max_seqs=0), "inference_eval.max_seqs must be positive when set, got 0"),
        (dict(inference_eval__max_prefill_size=0), "inference_eval.max_prefill_size must be positive when set, got 0"),
        (
            dict(inference_eval__page_size=16, inference_eval__max_pages=3),
            "inference_eval.max_pages=3 is too small for one sequence of max_seq_len=64 (4 pages needed at page_size=",
        ),
        (
            dict(model__max_seq_len=64, inference_eval__max_seq_len=128),
            "inference_eval.max_seq_len cannot exceed model max sequence length: 128 > 64",
        ),
    ],
)
def test_an_impossible_run_is_refused_before_anything_runs(changes, message):
    told = refusal(**changes)
    assert told.startswith("run.yaml: ") and message in told
