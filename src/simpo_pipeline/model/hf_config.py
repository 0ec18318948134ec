"""The keys of a Hugging Face `config.json`: which are supported, which have no effect, and values of the right type.

A key that changes what the model computes and is not supported is refused by name. This module knows nothing about the
model that the keys describe (see `config`).
"""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from simpo_pipeline.errors import ModelError

logger = logging.getLogger(__name__)

_DTYPES = (None, "float32", "float16", "bfloat16")
# Keys that change what the model computes, with the only values that are supported.
_SUPPORTED_VALUES: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    # Falcon 3's name for the same MLP.
    "activation": ("swiglu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
    # Code in the folder that would replace the model's own.
    "auto_map": (None, {}),
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
}
# Keys that `LlamaConfig.from_hf` reads.
_READ = frozenset(
    """
    architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    partial_rotary_factor original_max_position_embeddings tie_word_embeddings initializer_range
    """.split()
)
# Keys that never change the logits of a LlamaForCausalLM in transformers: token ids, labels, defaults of generation and
# of the Python classes. Tokenizers and generation have their own files.
_WITHOUT_EFFECT = frozenset(
    """
    _name_or_path name_or_path transformers_version _commit_hash tokenizer_class use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    experts_implementation _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate tie_last_hidden_states
    chunk_size_feed_forward is_decoder torchscript use_bfloat16 tf_legacy_loss remove_invalid_values
    finetuning_task id2label label2id num_labels problem_type task_specific_params prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
    """.split()
)
# Parts of the names of settings that change what a model computes, in the configs of Llama's relatives.
_COMPUTING = tuple(
    """
    rope rotary ntk yarn alibi position attention attn window qk kv bias norm scale scaling softcap cap_ multiplier clip
    expert moe router quant compress bit lora adapter prun act_ activation embed logit layer head mlp ffn residual
    """.split()
)
# Parts of the names of other settings: kernels, and dropout, which neither generation nor training has here.
_NOT_COMPUTING = ("flash", "implementation", "drop")


def refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    """Check the keys that change what the model computes, and log the names of unknown keys that do not.

    Raises:
        ModelError: The config is not that of a plain `LlamaForCausalLM`.
    """
    architectures = hf_config.get("architectures") or ["LlamaForCausalLM"]
    model_type = hf_config.get("model_type", "llama")
    if model_type != "llama" or architectures != ["LlamaForCausalLM"]:
        names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)
        raise ModelError(
            f"architecture {_printable(names)} (model_type {model_type!r:.80}) is not supported; "
            "only LlamaForCausalLM (model_type 'llama') is"
        )
    for key, supported in _SUPPORTED_VALUES.items():
        value = hf_config.get(key, supported[0])
        if value not in supported:
            raise refused(key, value, f"only {' or '.join(map(repr, supported))} is supported")
    known = _READ | _WITHOUT_EFFECT | _SUPPORTED_VALUES.keys()
    ignored = [str(key) for key, value in hf_config.items() if key not in known and not _is_off(str(key), value)]
    for key in ignored:
        if _may_compute(key):
            raise refused(
                key, hf_config[key], "it may change what the model computes; if it does not, remove it from config.json"
            )
    if ignored:
        logger.info(
            "config.json has keys that do not change what the model computes; ignored: %s",
            ", ".join(map(_printable, ignored)),
        )


def whole_number(values: Mapping[str, Any], key: str, *, unset: int | None = None, within: str = "") -> int:
    """Return an integer. `unset` is the value of a key that is missing or null; None: neither is allowed.

    Raises:
        ModelError: The key is missing, or its value is no integer. `within` is the name of the object it is in.
    """
    if unset is not None and values.get(key) is None:
        return unset
    value = _present(values, key, within)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refused(named(key, within), value, "it must be an integer")
    return value


def number(values: Mapping[str, Any], key: str, *, default: float | None = None, within: str = "") -> float:
    """Return a finite number. `default` is the value of a key that is missing.

    Raises:
        ModelError: The key is missing, or its value is no finite number. `within` is the name of the object it is in.
    """
    if default is not None and key not in values:
        return default
    value = _present(values, key, within)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # False for NaN, for infinities, and for integers that no float can hold.
    if not is_number or not abs(value) <= sys.float_info.max:
        raise refused(named(key, within), value, "it must be a finite number")
    return float(value)


def refused(key: str, value: object, allowed: str) -> ModelError:
    """Return the error for a value of config.json; `allowed` says what the key may hold."""
    return ModelError(f"config.json has {_printable(key)}: {value!r:.80}; {allowed}")


def named(key: str, within: str) -> str:
    """Return the path of a key of config.json; `within` is the name of the object it is in, empty for the whole."""
    return f"{within}.{key}" if within else key


def _present(values: Mapping[str, Any], key: str, within: str) -> Any:
    if key not in values:
        where = f" in {within}" if within else ""
        raise ModelError(
            f"the model's config.json has no {key!r}{where}; a complete config of LlamaForCausalLM is required"
        )
    return values[key]


def _printable(key: str) -> str:
    return f"{key if key.isprintable() else repr(key):.80}"


def _may_compute(key: str) -> bool:
    name = key.lower()
    return any(part in name for part in _COMPUTING) and not any(part in name for part in _NOT_COMPUTING)


def _is_off(key: str, value: object) -> bool:
    """Return whether a setting with this value is switched off in every model: null, false or empty, or no dropout."""
    return value is None or value is False or value in ({}, []) or (value == 0 and "drop" in key.lower())
