"""Conversion of a Llama in a GGUF file (llama.cpp's format) to Hugging Face's layout. NumPy only.

Quantised tensors are dequantised to fp32. llama.cpp interleaves the rows of the query and key matrices, so that rotary
pairs are adjacent. Hugging Face keeps the two halves of a head apart, so those rows are reordered. The file is read and
checked by `gguf_file`. This module does not know where it comes from.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import ReaderTensor
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.gguf_file import read_gguf, refuse_other_types, values_of
from simpo_pipeline.model.hf_weights import CONFIG_FILE, SINGLE_FILE, write_safetensors
from simpo_pipeline.storage.files import write_json

LAYER_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_TENSORS: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_NEEDED_KEYS: Mapping[str, str] = {
    "llama.block_count": "an integer",
    "llama.context_length": "an integer",
    "llama.embedding_length": "an integer",
    "llama.feed_forward_length": "an integer",
    "llama.attention.head_count": "an integer",
    "llama.attention.head_count_kv": "an integer",
    "llama.attention.layer_norm_rms_epsilon": "a number",
    "tokenizer.ggml.tokens": "a list of texts",
    "tokenizer.ggml.token_type": "a list of integers",
    "tokenizer.ggml.merges": "a list of texts",
    "tokenizer.ggml.bos_token_id": "an integer",
    "tokenizer.ggml.eos_token_id": "an integer",
    "tokenizer.ggml.padding_token_id": "an integer",
    "tokenizer.chat_template": "a text",
}
# Other keys of a model that are heeded or checked.
_OTHER_KEYS: Mapping[str, str] = {
    "llama.attention.key_length": "an integer",
    "llama.attention.value_length": "an integer",
    "llama.rope.dimension_count": "an integer",
    "llama.rope.freq_base": "a number",
    "llama.rope.scaling.type": "a text",
    "llama.vocab_size": "an integer",
    "tokenizer.ggml.unknown_token_id": "an integer",
}
CONTROL_TOKEN = 3  # GGUF's type for tokens that mark structure and are never text


def convert_gguf(gguf_path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write config.json, generation_config.json, model.safetensors (fp32) and the tokenizer's files to `folder`.

    Raises:
        ModelError: The file is not a whole Llama with a SmolLM tokenizer and a chat template.
    """
    gguf_path, folder = Path(gguf_path), Path(folder)
    fields, tensors = read_gguf(gguf_path)
    _refuse_unsupported(gguf_path, fields)
    _refuse_broken_vocabulary(gguf_path, fields)
    config = _model_config(fields, tied="output.weight" not in tensors)
    _refuse_other_heads(gguf_path, fields, config)
    weights = {_hf_name(name): _weights(gguf_path, tensor, config) for name, tensor in tensors.items()}
    special_ids = {
        f"{role}_token_id": fields[f"tokenizer.ggml.{name}_token_id"]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    write_json(str(folder / CONFIG_FILE), {**config.to_hf(), **special_ids, "torch_dtype": "float32"})
    write_json(str(folder / "generation_config.json"), special_ids)
    _write_tokenizer(fields, special_ids, folder)
    write_safetensors(folder / SINGLE_FILE, weights)


def _refuse_unsupported(gguf_path: Path, fields: Mapping[str, Any]) -> None:
    needed = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        # The pre-tokenizer. Another name means another regular expression, and so different tokens.
        "tokenizer.ggml.pre": "smollm",
    }
    for key, supported in needed.items():
        if fields.get(key) != supported:
            raise ModelError(
                f"{gguf_path}: {key} is {fields.get(key)!r}; only {supported!r} is supported in GGUF files, "
                "use the model's safetensors"
            )
    if "tokenizer.chat_template" not in fields:
        raise ModelError(f"{gguf_path}: the tokenizer has no chat template; use the instruction-tuned model")
    missing = [key for key in _NEEDED_KEYS if key not in fields]
    if missing:
        raise ModelError(f"{gguf_path} has no {', '.join(missing)}; download it again, or use the model's safetensors")
    kinds = {**_NEEDED_KEYS, **_OTHER_KEYS}
    refuse_other_types(gguf_path, fields, kinds)
    unknown = [key for key in fields if key.startswith("llama.") and key not in kinds]
    if unknown:
        raise ModelError(
            f"{gguf_path}: {unknown[0]} is {fields[unknown[0]]!r:.80}, which may change what the model computes and is "
            "not supported in GGUF files; use the model's safetensors"
        )
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise ModelError(f"{gguf_path}: rope scaling is not supported in GGUF files; use the model's safetensors")


def _refuse_broken_vocabulary(gguf_path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse ids, types and merges that do not fit the list of tokens."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocabulary = set(tokens)
    problems = []
    if len(vocabulary) != len(tokens):
        problems.append("tokenizer.ggml.tokens has the same token twice")
    if len(types) != len(tokens):
        problems.append(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    for key in fields:
        if key.endswith("_token_id") and key in {**_NEEDED_KEYS, **_OTHER_KEYS} and not 0 <= fields[key] < len(tokens):
            problems.append(f"{key} is {fields[key]}, but the ids of its tokens are 0 to {len(tokens) - 1}")
    for merge in fields["tokenizer.ggml.merges"]:
        parts = merge.split(" ")
        if len(parts) != 2 or not vocabulary.issuperset([*parts, "".join(parts)]):
            problems.append(
                f"tokenizer.ggml.merges has {merge!r:.80}, which does not join two of its tokens to a third"
            )
            break
    if problems:
        raise ModelError(f"{gguf_path}: {'; '.join(problems)}. Download it again, or use the model's safetensors")


def _refuse_other_heads(gguf_path: Path, fields: Mapping[str, Any], config: LlamaConfig) -> None:
    """Refuse values and rotations of only a part of each head."""
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.get(key, config.head_dim) != config.head_dim:
            raise ModelError(
                f"{gguf_path}: {key} is {fields[key]!r:.40}; only the size of a head, {config.head_dim}, is supported, "
                "use the model's safetensors"
            )
    num_tokens = fields.get("llama.vocab_size", config.vocab_size)
    if num_tokens != config.vocab_size:
        raise ModelError(
            f"{gguf_path}: llama.vocab_size is {num_tokens!r:.40}, but its tokenizer has {config.vocab_size} tokens; "
            "use the model's safetensors"
        )


def _model_config(fields: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    def setting(key: str) -> Any:
        return fields[f"llama.{key}"]

    hidden_size, num_heads = setting("embedding_length"), setting("attention.head_count")
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=setting("feed_forward_length"),
        num_layers=setting("block_count"),
        num_heads=num_heads,
        num_kv_heads=setting("attention.head_count_kv"),
        # 0 heads are refused by LlamaConfig.
        head_dim=fields.get("llama.attention.key_length", hidden_size // max(num_heads, 1)),
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        max_seq_len=setting("context_length"),
        # The value is stored as fp32: 1e-5 reads as 9.99999974e-06. Rounding to 7 digits restores it.
        rms_norm_eps=float(f"{setting('attention.layer_norm_rms_epsilon'):.6e}"),
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        tie_word_embeddings=tied,
    )


def _hf_name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case ["blk", layer, name, "weight"] if name in LAYER_TENSORS:
            return f"model.layers.{layer}.{LAYER_TENSORS[name]}.weight"
        case [name, "weight"] if name in TOP_TENSORS:
            return f"{TOP_TENSORS[name]}.weight"
    raise ModelError(f"the GGUF file contains tensor {gguf_name!r}, which a plain Llama does not have")


def _weights(gguf_path: Path, tensor: ReaderTensor, config: LlamaConfig) -> np.ndarray:
    weights = values_of(gguf_path, tensor)
    if ".attn_q." not in tensor.name and ".attn_k." not in tensor.name:
        return np.ascontiguousarray(weights)
    if weights.ndim != 2 or len(weights) % config.head_dim:
        raise ModelError(
            f"{gguf_path}: {tensor.name} has shape {weights.shape}; its rows must be whole heads of {config.head_dim}. "
            "Download it again, or use the model's safetensors"
        )
    return _split_rotary_halves(weights, config.head_dim)


def _split_rotary_halves(weights: Float[np.ndarray, "rows embed"], head_dim: int) -> Float[np.ndarray, "rows embed"]:
    """Reorder rows from llama.cpp's [head, pair, 2] to Hugging Face's [head, 2, pair]."""
    rows, embed = weights.shape
    pairs = weights.reshape(rows // head_dim, head_dim // 2, 2, embed)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, embed))


def _write_tokenizer(fields: Mapping[str, Any], special_ids: Mapping[str, int], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges: list[tuple[str, str]] = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # SmolLM's pre-tokenizer: every digit is a token.
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    roles = {f"{role}_token": tokens[special_ids[f"{role}_token_id"]] for role in ("bos", "eos", "pad")}
    if "tokenizer.ggml.unknown_token_id" in fields:
        roles["unk_token"] = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    write_json(str(folder / "tokenizer.json"), json.loads(tokenizer.to_str()))
    write_json(str(folder / "special_tokens_map.json"), roles)
    write_json(
        str(folder / "tokenizer_config.json"),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
        },
    )
