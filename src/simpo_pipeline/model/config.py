"""The shape of a Llama-family model, and its conversion from and to a Hugging Face `config.json`.

This module does not import JAX: plans are made from it on machines without an accelerator. It knows neither where the
weights are stored (`hf_weights`) nor what they compute (`transformer`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from simpo_pipeline.errors import ModelError

# Keys of config.json that change what the model computes, with the only value that is supported.
_REQUIRED_VALUES: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling of the rotary wavelengths: long ones by `factor`, short ones not at all."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_seq_len < 1:
            raise ModelError(
                f"rope scaling has factor {self.factor} and original_max_position_embeddings "
                f"{self.original_max_seq_len}; both must be at least 1"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelError(
                f"rope scaling requires 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a model. Models with equal configs have parameters of equal shapes."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.type is int and size < 1:
                raise ModelError(f"{field.name} must be at least 1, got {size}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}): "
                "each key/value head serves an equal group of query heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even, because rotary embedding rotates pairs, got {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ModelError(f"{name} must be a positive finite number, got {getattr(self, name)}")

    @property
    def num_parameters(self) -> int:
        """Number of elements in the parameter tree. A tied head is counted once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.num_layers * layer + self.hidden_size

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> "LlamaConfig":
        """Convert a Hugging Face config of `LlamaForCausalLM`, in the format of transformers 4 or 5.

        Raises:
            ModelError: The config requires something that this model does not support, or lacks a size.
        """
        _refuse_unsupported(hf_config)
        try:
            num_heads = int(hf_config["num_attention_heads"])
            hidden_size = int(hf_config["hidden_size"])
            rope_theta, rope_scaling = _rope_from_hf(hf_config)
            return cls(
                hidden_size=hidden_size,
                intermediate_size=int(hf_config["intermediate_size"]),
                num_layers=int(hf_config["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(hf_config.get("num_key_value_heads") or num_heads),
                head_dim=int(hf_config.get("head_dim") or hidden_size // num_heads),
                vocab_size=int(hf_config["vocab_size"]),
                max_seq_len=int(hf_config["max_position_embeddings"]),
                rms_norm_eps=float(hf_config["rms_norm_eps"]),
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
                initializer_range=float(hf_config.get("initializer_range", 0.02)),
            )
        except KeyError as missing:
            raise ModelError(
                f"the model's config.json has no {missing}; a complete config of LlamaForCausalLM is required"
            ) from None

    def to_hf(self) -> dict[str, Any]:
        """Return this config as a Hugging Face `config.json`. `from_hf` converts it back to an equal config.

        Rope settings are in the format of transformers 4, which transformers 5 still accepts.
        """
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_seq_len,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "use_cache": True,
        }


def _refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    architectures = hf_config.get("architectures") or ["LlamaForCausalLM"]
    model_type = hf_config.get("model_type", "llama")
    if model_type != "llama" or list(architectures) != ["LlamaForCausalLM"]:
        raise ModelError(
            f"architecture {', '.join(map(str, architectures))} (model_type {model_type!r}) is not supported; "
            "only LlamaForCausalLM (model_type 'llama') is"
        )
    for key, supported in _REQUIRED_VALUES.items():
        value = hf_config.get(key, supported)
        if value != supported:
            raise ModelError(f"config.json has {key}: {value!r}; only {supported!r} is supported")


def _rope_from_hf(hf_config: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Return (theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", hf_config.get("rope_theta", 10_000.0)))
    # Before transformers 4.43 the key was "type".
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise ModelError(f"rope type {rope_type!r} is not supported; only 'default' and 'llama3' are")
    return theta, Llama3RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_seq_len=int(rope["original_max_position_embeddings"]),
    )
