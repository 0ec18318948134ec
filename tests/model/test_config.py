"""The config's own rules, and its translation from and to Hugging Face's config.json."""

import dataclasses

import pytest

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import Llama3RopeScaling, LlamaConfig

# As published with Llama-3.1-8B-Instruct (transformers 4 spelling), without keys that do not affect the computation.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_llama_3_1_8b_is_read_with_its_rope_scaling_and_parameter_count():
    config = LlamaConfig.from_hf(LLAMA_3_1_8B)
    assert config.head_dim == 128
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config.num_parameters == 8_030_261_248


def test_the_spelling_of_transformers_5_is_equivalent():
    old = {key: value for key, value in LLAMA_3_1_8B.items() if key not in ("rope_scaling", "rope_theta")}
    new = old | {"rope_parameters": LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}}
    assert LlamaConfig.from_hf(new) == LlamaConfig.from_hf(LLAMA_3_1_8B)


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None}, {"tie_word_embeddings": True}, {"head_dim": 64}])
def test_a_written_config_reads_back_equal(changes):
    config = LlamaConfig.from_hf(LLAMA_3_1_8B | changes)
    assert LlamaConfig.from_hf(config.to_hf()) == config


def test_old_configs_without_kv_heads_head_dim_or_rope_get_hugging_faces_defaults():
    omitted = ("num_key_value_heads", "rope_scaling", "rope_theta", "architectures", "initializer_range")
    config = LlamaConfig.from_hf({key: value for key, value in LLAMA_3_1_8B.items() if key not in omitted})
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10_000.0)
    assert config.rope_scaling is None
    without_tying = {key: value for key, value in LLAMA_3_1_8B.items() if key != "tie_word_embeddings"}
    assert LlamaConfig.from_hf(without_tying).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM .* only LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias: True; only False"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; only 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp: 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported; .* 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
    ],
)
def test_unsupported_options_are_refused_by_name(changes, words):
    with pytest.raises(ModelError, match=words):
        LlamaConfig.from_hf(LLAMA_3_1_8B | changes)


def test_a_missing_size_is_named():
    with pytest.raises(ModelError, match="no 'hidden_size'"):
        LlamaConfig.from_hf({key: value for key, value in LLAMA_3_1_8B.items() if key != "hidden_size"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_heads": 5}, r"num_heads \(32\) must be a multiple of num_kv_heads \(5\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
    ],
)
def test_impossible_shapes_are_refused(changes, words):
    with pytest.raises(ModelError, match=words):
        dataclasses.replace(LlamaConfig.from_hf(LLAMA_3_1_8B), **changes)


def test_rope_scaling_needs_its_bounds_in_order():
    with pytest.raises(ModelError, match=r"low_freq_factor < high_freq_factor, got 4\.0 and 1\.0"):
        Llama3RopeScaling(8.0, 4.0, 1.0, 8192)
