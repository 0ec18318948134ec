"""A Llama in a GGUF file (llama.cpp's format), rewritten in Hugging Face's layout. Numpy only.

Quantised tensors are dequantised to fp32. llama.cpp stores the rows of the query and key matrices with rotary pairs
side by side; Hugging Face keeps the two halves of a head apart, so those rows are put back in order.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from jaxtyping import Float
from safetensors.numpy import save_file

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.config import LlamaConfig

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
CONTROL_TOKEN = 3  # gguf's type of a token that marks structure and is never text


def convert_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors (fp32) and the tokenizer's files to `folder`.

    Raises:
        ModelError: the file is not a Llama with a byte-level BPE tokenizer and a chat template.
    """
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unsupported(gguf_path, fields)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _model_config(fields, tied="output.weight" not in tensors)
    weights = {_hf_name(name): _weights(tensor, config) for name, tensor in tensors.items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    special_ids = {
        f"{role}_token_id": int(fields[f"tokenizer.ggml.{name}_token_id"])
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    _write_json(folder / "config.json", {**config.to_hf(), **special_ids, "torch_dtype": "float32"})
    _write_json(folder / "generation_config.json", special_ids)
    _write_tokenizer(fields, special_ids, folder)


def _refuse_unsupported(gguf_path: Path, fields: Mapping[str, Any]) -> None:
    for key, supported in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
        if fields.get(key) != supported:
            raise ModelError(f"{gguf_path}: {key} is {fields.get(key)!r}; only {supported!r} is supported")
    if "tokenizer.chat_template" not in fields:
        raise ModelError(f"{gguf_path}: the tokenizer has no chat template; use the instruction-tuned model")
    if "rope_freqs.weight" in fields or "llama.rope.scaling.type" in fields:
        raise ModelError(f"{gguf_path}: scaled rope is not read from GGUF; use the model's safetensors")


def _model_config(fields: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    def number(key: str) -> Any:
        return fields[f"llama.{key}"]

    hidden_size, num_heads = int(number("embedding_length")), int(number("attention.head_count"))
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=int(number("feed_forward_length")),
        num_layers=int(number("block_count")),
        num_heads=num_heads,
        num_kv_heads=int(number("attention.head_count_kv")),
        head_dim=hidden_size // num_heads,
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        max_seq_len=int(number("context_length")),
        # Stored as fp32: 1e-5 comes back as 9.99999974e-06, which 7 digits restore.
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon'):.6e}"),
        rope_theta=float(fields.get("llama.rope.freq_base", 10_000.0)),
        tie_word_embeddings=tied,
    )


def _hf_name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case ["blk", layer, name, "weight"] if name in LAYER_TENSORS:
            return f"model.layers.{layer}.{LAYER_TENSORS[name]}.weight"
        case [name, "weight"] if name in TOP_TENSORS:
            return f"{TOP_TENSORS[name]}.weight"
    raise ModelError(f"the GGUF file holds tensor {gguf_name!r}, which a plain Llama does not have")


def _weights(tensor: Any, config: LlamaConfig) -> np.ndarray:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    if ".attn_q." in tensor.name:
        return _split_rotary_halves(weights, config.num_heads)
    if ".attn_k." in tensor.name:
        return _split_rotary_halves(weights, config.num_kv_heads)
    return weights


def _split_rotary_halves(weights: Float[np.ndarray, "rows embed"], num_heads: int) -> Float[np.ndarray, "rows embed"]:
    """Rows [head, pair, 2] as llama.cpp orders them, to [head, 2, pair] as Hugging Face does."""
    rows, embed = weights.shape
    pairs = weights.reshape(num_heads, rows // num_heads // 2, 2, embed)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, embed))


def _write_tokenizer(fields: Mapping[str, Any], special_ids: Mapping[str, int], folder: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": index, "content": tokens[index], **flags} for index, kind in enumerate(types) if kind == CONTROL_TOKEN
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            # SmolLM's own: every digit is a token.
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": fields["tokenizer.ggml.merges"],
            },
        },
    )
    roles = {f"{role}_token": tokens[special_ids[f"{role}_token_id"]] for role in ("bos", "eos", "pad")}
    _write_json(folder / "special_tokens_map.json", roles)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **roles,
            "model_max_length": int(fields["llama.context_length"]),
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
