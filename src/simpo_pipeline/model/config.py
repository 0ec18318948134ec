"""The shape of a Llama-family model, and its conversion from and to a Hugging Face `config.json`.

This module does not import JAX: plans are made from it on machines without an accelerator. It knows neither where the
weights are stored (`hf_weights`) nor what they compute (`transformer`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from simpo_pipeline.errors import ModelError
from simpo_pipeline.model.hf_config import named, number, refuse_unsupported, refused, whole_number

# Array indices are int32 on the devices.
_MAX_SIZE = 2**31 - 1
# Every layer has its own tensors, so a wrong number of layers would mean names without end.
_MAX_LAYERS = 10_000
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LLAMA3_KEYS = frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"})


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's scaling of the rotary wavelengths: long ones by `factor`, short ones not at all."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            if not math.isfinite(getattr(self, name)):
                raise ModelError(f"rope scaling has {name} {getattr(self, name)}; it must be a finite number")
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
            most = _MAX_LAYERS if field.name == "num_layers" else _MAX_SIZE
            if field.type is int and size > most:
                raise ModelError(f"{field.name} must be at most {most}, got {size!r:.40}")
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

        A null means what it means there: for `num_key_value_heads`, `head_dim` and the rope dictionaries, the default.

        Raises:
            ModelError: The config requires something that this model does not support, lacks a size, or has a value
                of another type. The message names the key.
        """
        refuse_unsupported(hf_config)
        num_heads, hidden_size = whole_number(hf_config, "num_attention_heads"), whole_number(hf_config, "hidden_size")
        rope_theta, rope_scaling = _rope_from_hf(hf_config)
        tied = hf_config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise refused("tie_word_embeddings", tied, "it must be true or false")
        return cls(
            hidden_size=hidden_size,
            intermediate_size=whole_number(hf_config, "intermediate_size"),
            num_layers=whole_number(hf_config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=whole_number(hf_config, "num_key_value_heads", unset=num_heads),
            head_dim=_head_dim(hf_config, hidden_size, num_heads),
            vocab_size=whole_number(hf_config, "vocab_size"),
            max_seq_len=whole_number(hf_config, "max_position_embeddings"),
            rms_norm_eps=number(hf_config, "rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=tied,
            initializer_range=number(hf_config, "initializer_range", default=0.02),
        )

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


def _head_dim(hf_config: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if hf_config.get("head_dim") is not None:
        return whole_number(hf_config, "head_dim")
    if num_heads < 1 or hidden_size % num_heads:
        raise ModelError(
            f"config.json has no head_dim, and hidden_size ({hidden_size!r:.40}) is not a multiple of "
            f"num_attention_heads ({num_heads!r:.40}); add head_dim, or correct the sizes"
        )
    return hidden_size // num_heads


def _rope_from_hf(hf_config: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Return (theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    theta = number(hf_config, "rope_theta", default=10_000.0)
    if hf_config.get("partial_rotary_factor") is not None:
        _refuse_partial_rotation(hf_config)
    found = {key: hf_config[key] for key in ("rope_parameters", "rope_scaling") if hf_config.get(key) is not None}
    ropes = {key: _rope_of(key, rope, theta) for key, rope in found.items() if rope != {}}
    if len(set(ropes.values())) > 1:
        raise ModelError(
            "config.json has rope_parameters and rope_scaling, which contradict each other; remove the wrong one"
        )
    theta_of_rope, scaling = next(iter(ropes.values()), (theta, None))
    if "rope_theta" in hf_config and theta_of_rope != theta:
        raise ModelError(
            f"config.json has rope_theta: {theta} and {theta_of_rope} in {next(iter(ropes))}; remove the wrong one"
        )
    original = hf_config.get("original_max_position_embeddings")
    if scaling is not None and original not in (None, scaling.original_max_seq_len):
        raise refused(
            "original_max_position_embeddings", original, f"its rope scaling has {scaling.original_max_seq_len}"
        )
    return theta_of_rope, scaling


def _rope_of(name: str, rope: Any, default_theta: float) -> tuple[float, Llama3RopeScaling | None]:
    """Return (theta, scaling) from the dictionary with this name."""
    if not isinstance(rope, Mapping):
        raise refused(name, rope, "it must be an object or null")
    # Before transformers 4.43 the key was "type".
    kinds = [rope[key] for key in ("rope_type", "type") if key in rope] or ["default"]
    if any(kind != kinds[0] for kind in kinds) or not isinstance(kinds[0], str):
        raise refused(f"{name}.rope_type", kinds, "it must be one name; remove the wrong one")
    if kinds[0] not in ("default", "llama3"):
        raise ModelError(
            f"config.json has {name}: rope type {kinds[0]!r:.40} is not supported; only 'default' and 'llama3' are"
        )
    known = _ROPE_KEYS | (_LLAMA3_KEYS if kinds[0] == "llama3" else frozenset())
    unknown = sorted(map(str, rope.keys() - known))
    if unknown:
        raise refused(
            f"{name}.{unknown[0]}",
            rope.get(unknown[0]),
            f"rope type {kinds[0]!r} has only the keys {', '.join(sorted(known))}",
        )
    if "partial_rotary_factor" in rope:
        _refuse_partial_rotation(rope, name)
    theta = number(rope, "rope_theta", default=default_theta, within=name)
    if kinds[0] == "default":
        return theta, None
    return theta, Llama3RopeScaling(
        factor=number(rope, "factor", within=name),
        low_freq_factor=number(rope, "low_freq_factor", within=name),
        high_freq_factor=number(rope, "high_freq_factor", within=name),
        original_max_seq_len=whole_number(rope, "original_max_position_embeddings", within=name),
    )


def _refuse_partial_rotation(values: Mapping[str, Any], within: str = "") -> None:
    key = "partial_rotary_factor"
    if number(values, key, within=within) != 1:
        raise refused(named(key, within), values[key], "only 1 is supported: whole heads are rotated")
