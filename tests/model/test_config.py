"""The config's own rules, and its translation from and to Hugging Face's config.json."""

import dataclasses
import json
import math
from typing import Any

import pytest
import transformers

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


# The keys in which the config.json of a published model differs from LLAMA_3_1_8B, shortened.
OLDER: dict[str, Any] = {"rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 32000, "torch_dtype": "float16"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b": OLDER
    | {"intermediate_size": 11008, "max_position_embeddings": 2048, "max_sequence_length": 2048, "pad_token_id": 0}
    | {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "transformers_version": "4.30.0.dev0"},
    "Llama-2-7b": OLDER
    | {"intermediate_size": 11008, "max_position_embeddings": 4096, "num_key_value_heads": 32}
    | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "transformers_version": "4.31.0.dev0"},
    "TinyLlama-1.1B-Chat": OLDER
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "factor": 32.0}, "tie_word_embeddings": True},
    "SmolLM2-135M-Instruct": OLDER
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "tie_word_embeddings": True, "vocab_size": 49152, "rope_theta": 100000}
    | {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"q4": "x"}}},
    "Yi-6B": OLDER | {"intermediate_size": 11008, "num_key_value_heads": 4, "rope_theta": 5000000.0},
    "Falcon3-1B-Base": OLDER
    | {"hidden_size": 2048, "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"activation": "swiglu", "rope_theta": 1000042},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
    "Qwen3": ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
    "Mistral": ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    "deepseek-coder": ({"rope_scaling": {"factor": 4.0, "type": "linear"}}, "'linear'"),
    "longchat": ({"rope_condense_ratio": 8}, "rope_condense_ratio: 8"),
    "granite-code": ({"attention_bias": True, "mlp_bias": True}, "attention_bias: True"),
    "internlm": ({"bias": True}, "bias: True"),
    "gptq": ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "quantization_config"),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_mean_what_transformers_reads_from_them(model):
    hf_config = LLAMA_3_1_8B | PUBLISHED[model]
    ours, theirs = LlamaConfig.from_hf(hf_config), transformers.LlamaConfig(**json.loads(json.dumps(hf_config)))
    rope: Any = theirs.rope_parameters
    assert (ours.head_dim, ours.num_kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)
    assert (ours.rope_theta, ours.tie_word_embeddings) == (rope["rope_theta"], theirs.tie_word_embeddings)
    assert (ours.rope_scaling is None) == (rope["rope_type"] == "default")


@pytest.mark.parametrize("model", REFUSED)
def test_published_models_that_compute_something_else_are_refused_by_name(model):
    changes, words = REFUSED[model]
    with pytest.raises(ModelError, match=words):
        LlamaConfig.from_hf(LLAMA_3_1_8B | changes)


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


INTEGERS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings"),
)
FLOATS = ("rms_norm_eps", "rope_theta", "initializer_range")
# Null stands for the default of these keys, in transformers too.
NULL_IS_DEFAULT = ("num_key_value_heads", "head_dim")


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [None, True, "64", 64.0, 0.5, math.nan, [64], {}])
def test_a_size_that_is_no_integer_is_refused_by_name(key, value):
    if value is None and key in NULL_IS_DEFAULT:
        LlamaConfig.from_hf(LLAMA_3_1_8B | {key: None})
        return
    with pytest.raises(ModelError, match=rf"config\.json has {key}: .*; it must be an integer"):
        LlamaConfig.from_hf(LLAMA_3_1_8B | {key: value})


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, -4096, 2**31, 10**400])
def test_a_size_that_no_model_has_is_refused(key, value):
    with pytest.raises(ModelError, match=r"must be at (least|most)|is not a multiple|must be a multiple"):
        LlamaConfig.from_hf(LLAMA_3_1_8B | {key: value})


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [None, True, "1e-5", [1.0], math.nan, math.inf, -math.inf, 10**400, 0, -1e-5])
def test_a_constant_that_is_no_positive_number_is_refused_by_name(key, value):
    with pytest.raises(ModelError, match=rf"{key}.*must be a (positive )?finite number"):
        LlamaConfig.from_hf(LLAMA_3_1_8B | {key: value})


def test_an_integer_is_a_number():
    assert LlamaConfig.from_hf(LLAMA_3_1_8B | {"rope_theta": 500000}) == LlamaConfig.from_hf(LLAMA_3_1_8B)


ROPE: dict[str, Any] = LLAMA_3_1_8B["rope_scaling"]


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": None}, r"\.factor: None; it must be a finite number"),
        ({"factor": "8"}, r"\.factor: '8'; it must be a finite number"),
        ({"factor": math.nan}, r"\.factor: nan"),
        ({"factor": 0.5}, "factor 0.5"),
        ({"low_freq_factor": True}, r"\.low_freq_factor: True"),
        ({"high_freq_factor": [4]}, r"\.high_freq_factor: \[4\]"),
        ({"high_freq_factor": 1.0}, "low_freq_factor < high_freq_factor"),
        ({"original_max_position_embeddings": 8192.0}, r"\.original_max_position_embeddings: 8192\.0; it must be an"),
        ({"original_max_position_embeddings": None}, r"\.original_max_position_embeddings: None"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings 0"),
        ({"rope_theta": None}, r"\.rope_theta: None; it must be a finite number"),
        ({"rope_theta": "1"}, r"\.rope_theta: '1'"),
        ({"rope_type": None}, r"\.rope_type: \[None\]"),
        ({"rope_type": 3}, r"\.rope_type: \[3\]"),
        ({"type": "default"}, r"\.rope_type: \['llama3', 'default'\]; it must be one name"),
        ({"rope_type": "default"}, r"\.factor: 8\.0; rope type 'default' has only the keys"),
        ({"rope_type": "dynamic"}, "'dynamic' is not supported"),
        ({"rope_type": "longrope"}, "'longrope' is not supported"),
        ({"partial_rotary_factor": 0.5}, r"\.partial_rotary_factor: 0\.5; only 1 is supported"),
        ({"partial_rotary_factor": None}, r"\.partial_rotary_factor: None"),
        ({"attention_factor": 1.2}, r"\.attention_factor: 1\.2; rope type 'llama3' has only the keys"),
        ({"beta_fast": 32}, r"\.beta_fast: 32"),
        ({"full_attention": {"rope_type": "default"}}, r"\.full_attention"),
    ],
)
def test_a_rope_dictionary_has_exactly_the_keys_of_its_type(spelling, changes, words):
    plain = {key: value for key, value in LLAMA_3_1_8B.items() if key not in ("rope_scaling", "rope_theta")}
    theta = {"rope_theta": 500000.0}
    assert LlamaConfig.from_hf(plain | {spelling: ROPE | theta}).rope_scaling is not None
    with pytest.raises(ModelError, match=words):
        LlamaConfig.from_hf(plain | {spelling: ROPE | theta | changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling: 'llama3'; it must be an object or null"),
        ({"rope_scaling": []}, r"rope_scaling: \[\]; it must be an object or null"),
        ({"rope_scaling": False}, "rope_scaling: False; it must be an object or null"),
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling\.factor: 8\.0; rope type 'default'"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling, which contradict"),
        ({"rope_scaling": ROPE | {"rope_theta": 10000.0}}, r"rope_theta: 500000\.0 and 10000\.0 in rope_scaling"),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor: 0\.25; only 1 is supported"),
        ({"partial_rotary_factor": "1"}, "partial_rotary_factor: '1'"),
        (
            {"original_max_position_embeddings": 4096},
            "original_max_position_embeddings: 4096; its rope scaling has 8192",
        ),
    ],
)
def test_rope_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ModelError, match=words):
        LlamaConfig.from_hf(LLAMA_3_1_8B | changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", None),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("hidden_activation", "gelu"),
        ("activation", "geglu"),
        ("attention_bias", None),
        ("attention_bias", "false"),
        ("mlp_bias", "no"),
        ("qkv_bias", True),
        ("pretraining_tp", 4),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {}),
        ("quantization", "awq"),
        ("compression_config", {"format": "float-quantized"}),
        ("torch_dtype", "float8_e4m3fn"),
        ("dtype", "int8"),
        ("tie_word_embeddings", None),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", 0),
        ("sliding_window", 4096),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("per_layer_config", {"0": {"hidden_act": "gelu"}}),
        ("pruned_heads", {"0": [1]}),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("logit_scale", 0.0625),
        ("residual_multiplier", 0.22),
        ("embedding_multiplier", 12.0),
        ("scale_emb", 12),
        ("use_qk_norm", True),
        ("qk_layernorm", True),
        ("clip_qkv", 8.0),
        ("num_local_experts", 8),
        ("rope_ratio", 4),
        ("rope_interleaved", True),
        ("use_dynamic_ntk", True),
        ("use_logn_attn", True),
        ("alibi", True),
        ("norm_type", "layernorm"),
        ("activation_function", "relu"),
        ("parallel_attn", True),
        ("attention_chunk_size", 8192),
        ("no_rope_layers", [1, 0]),
        ("is_encoder_decoder", True),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Other"}),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", 5),
        ("architectures", ["LlamaForCausalLM", "Other"]),
        ("model_type", None),
        ("model_type", ["llama"]),
    ],
)
def test_a_key_that_changes_the_computation_is_refused_by_name(key, value):
    with pytest.raises(
        ModelError, match="architecture .* is not supported" if key in ("architectures", "model_type") else key
    ):
        LlamaConfig.from_hf(LLAMA_3_1_8B | {key: value})


def test_keys_without_effect_are_accepted_and_unknown_ones_are_logged(caplog):
    # As published with SmolLM2, with what other tools add, and settings that are switched off.
    silent = {
        **{"_name_or_path": "org/name", "transformers_version": "4.42.3", "pad_token_id": 2, "use_cache": True},
        **{"rope_interleaved": False, "attention_dropout": 0.0, "resid_pdrop": 0, "_attn_implementation": "sdpa"},
        **{"sliding_window": None, "use_sliding_window": False, "pruned_heads": {}, "quantization_config": None},
        **{"output_attentions": True, "temperature": 0.6, "top_k": 5, "max_length": 20, "id2label": {"0": "a"}},
        **{"original_max_position_embeddings": 8192, "partial_rotary_factor": 1.0, "auto_map": {}, "dtype": "float16"},
    }
    with caplog.at_level("INFO"):
        assert LlamaConfig.from_hf(LLAMA_3_1_8B | silent) == LlamaConfig.from_hf(LLAMA_3_1_8B)
        assert not caplog.records
        logged = {"is_llama_config": True, "unsloth_version": "2026.1", "attention_probs_dropout": 0.1}
        logged |= {"use_flash_attention_2": True}
        assert LlamaConfig.from_hf(LLAMA_3_1_8B | logged) == LlamaConfig.from_hf(LLAMA_3_1_8B)
    (record,) = caplog.records
    assert record.message.endswith(
        "ignored: is_llama_config, unsloth_version, attention_probs_dropout, use_flash_attention_2"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1234},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}, "rope_theta": 1234.5},
        {"rope_scaling": ROPE | {"rope_theta": 500000.0}},
        {"rope_scaling": None, "rope_parameters": ROPE},
        {"num_key_value_heads": None, "head_dim": None},
        {"head_dim": 64, "tie_word_embeddings": True},
    ],
)
def test_an_accepted_config_means_what_transformers_reads_from_it(changes):
    ours = LlamaConfig.from_hf(LLAMA_3_1_8B | changes)
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(LLAMA_3_1_8B | changes)))
    rope: Any = theirs.rope_parameters
    assert (ours.head_dim, ours.num_kv_heads) == (theirs.head_dim, theirs.num_key_value_heads)
    assert (ours.rope_theta, ours.tie_word_embeddings) == (rope["rope_theta"], theirs.tie_word_embeddings)
    scaling = ours.rope_scaling
    assert rope["rope_type"] == ("default" if scaling is None else "llama3")
    if scaling is not None:
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len) == (
            *(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]),
            rope["original_max_position_embeddings"],
        )


def test_a_head_size_is_not_guessed_from_sizes_that_do_not_divide():
    with pytest.raises(ModelError, match=r"no head_dim, and hidden_size \(4096\) is not a multiple of .* \(31\)"):
        LlamaConfig.from_hf(LLAMA_3_1_8B | {"num_attention_heads": 31, "num_key_value_heads": 31})


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
