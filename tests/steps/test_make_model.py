"""make_model writes a model that every later step can read, and the same model for the same seed."""

import dataclasses

import pytest

from simpo_pipeline.data.chat import load_tokenizer
from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.hf_weights import load_config
from simpo_pipeline.storage.checksum import crc32c_of
from simpo_pipeline.storage.files import read_json
from simpo_pipeline.storage.output_folder import OutputFolder
from steps.make_model import MakeModelConfig, make_model

SHAPE = LlamaConfig(
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=264,
    max_seq_len=64,
)


def test_the_folder_is_a_model_with_a_chat_tokenizer(tmp_path):
    make_model(MakeModelConfig(SHAPE), OutputFolder(str(tmp_path / "out")))
    assert load_config(str(tmp_path / "out")) == SHAPE
    assert load_tokenizer(str(tmp_path / "out")).chat_template
    assert read_json(str(tmp_path / "out" / "summary.json"))["num_parameters"] == SHAPE.num_parameters


def test_weights_are_a_function_of_the_seed(tmp_path):
    def checksum(name, seed):
        make_model(MakeModelConfig(SHAPE, seed=seed), OutputFolder(str(tmp_path / name)))
        return crc32c_of(str(tmp_path / name / "model.safetensors"))

    assert checksum("a", 1) == checksum("b", 1) != checksum("c", 2)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    small = dataclasses.replace(SHAPE, vocab_size=256)
    with pytest.raises(ModelError, match="vocab_size must be at least 261 for the byte tokenizer, got 256"):
        make_model(MakeModelConfig(small), OutputFolder(str(tmp_path / "out")))
