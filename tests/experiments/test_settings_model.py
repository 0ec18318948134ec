"""The shape that settings state for a loaded model is compared with its config.json and never replaces it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.settings.fetch_checked_model import FetchCheckedModelConfig, fetch_checked_model, fetch_step
from experiments.settings.model import ModelSettings, RopeSettings, contradictions
from simpo_pipeline.errors import ModelError
from simpo_pipeline.executor.step import unwrap_versioned_value
from simpo_pipeline.model.config import Llama3RopeScaling, LlamaConfig
from simpo_pipeline.model.hf_weights import stored_shapes
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.fetch_model import fetch_model

LLAMA_3_1 = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=261,
    max_seq_len=131072,
    rope_theta=500_000.0,
    rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
)
RESTATED = ModelSettings(
    max_seq_len=4096,  # a limit of the run, below the checkpoint's
    hidden_dim=64,
    num_heads=4,
    num_kv_heads=2,
    rope=RopeSettings(type="llama3", theta=500_000.0),
    initializer_range=0.5,  # unused for a loaded model
)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_1.to_hf()))
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    shapes = stored_shapes(abstract_llama(LLAMA_3_1, np.float32))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    return str(folder)


def test_a_correct_restatement_has_no_contradictions():
    assert contradictions(RESTATED.stated_shape(), LLAMA_3_1) == []
    assert contradictions(ModelSettings().stated_shape(), LLAMA_3_1) == []


def test_each_contradiction_names_both_values():
    wrong = ModelSettings(max_seq_len=200_000, num_kv_heads=4, tie_word_embeddings=True, rope=RopeSettings())
    assert contradictions(wrong.stated_shape(), LLAMA_3_1) == [
        "model.max_seq_len is 200000, but the checkpoint's limit is 131072",
        "model.num_kv_heads is 4, but the checkpoint's config.json has 2",
        "model.tie_word_embeddings is True, but the checkpoint's config.json has False",
        "model.rope.type is default, but the checkpoint's config.json has llama3",
    ]


def test_defaults_of_the_settings_contradict_no_checkpoint():
    assert fetch_step("some/model", ModelSettings(), None).fn is fetch_model


def test_a_fetch_with_a_stated_shape_fills_the_folder_and_passes(model_folder, tmp_path):
    config = FetchCheckedModelConfig(model_folder, RESTATED.stated_shape())
    fetch_checked_model(config, OutputFolder(str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == LLAMA_3_1.to_hf()


def test_a_fetched_model_of_another_shape_is_an_error_naming_both(model_folder, tmp_path):
    config = FetchCheckedModelConfig(model_folder, {"num_kv_heads": 4})
    with pytest.raises(ModelError, match=r"model\.num_kv_heads is 4, but the checkpoint's config\.json has 2; leave"):
        fetch_checked_model(config, OutputFolder(str(tmp_path / "out")))


def test_the_stated_shape_is_part_of_the_fetch_so_that_a_change_is_checked():
    step = fetch_step("some/model", ModelSettings(num_layers=2), "some/tokenizer")
    assert step.fn is fetch_checked_model
    assert unwrap_versioned_value(step.config.stated_shape) == {"num_layers": 2}
    assert unwrap_versioned_value(step.config.tokenizer_source) == "some/tokenizer"
