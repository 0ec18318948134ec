"""Settings of the model's shape: the whole shape for random weights, or a restatement of a checkpoint's shape.

A checkpoint's config.json is authoritative. The settings under `model` never change a loaded model. They are compared
with its config.json, and a difference is an error that names both values, so no default can override what was trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from simpo_pipeline.data.byte_tokenizer import VOCAB_SIZE
from simpo_pipeline.errors import ConfigError, ModelError
from simpo_pipeline.model.config import Llama3RopeScaling, LlamaConfig

# Setting -> field of LlamaConfig.
_SHAPE_FIELDS: Mapping[str, str] = {
    "max_seq_len": "max_seq_len",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
_NEEDED_FOR_RANDOM = ("max_seq_len", "hidden_dim", "intermediate_dim", "num_layers", "num_heads", "num_kv_heads")
ROPE_TYPES = ("default", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeSettings:
    """Rotary embedding: `default`, or `llama3`, which scales long wavelengths (the defaults are those of Llama 3.1)."""

    type: str = "default"
    theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ConfigError(f"model.rope.type is {self.type!r}; expected one of {', '.join(ROPE_TYPES)}")
        scaling = (self.factor, self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
        if self.type == "default" and any(value is not None for value in scaling):
            raise ConfigError("model.rope has factors of llama3 scaling, but its type is default; set type: llama3")

    def build(self) -> tuple[float, Llama3RopeScaling | None]:
        """Return (theta, scaling) of a model with random weights."""
        if self.type == "default":
            return (10_000.0 if self.theta is None else self.theta), None
        scaling = Llama3RopeScaling(
            factor=8.0 if self.factor is None else self.factor,
            low_freq_factor=1.0 if self.low_freq_factor is None else self.low_freq_factor,
            high_freq_factor=4.0 if self.high_freq_factor is None else self.high_freq_factor,
            original_max_seq_len=self.original_max_position_embeddings or 8192,
        )
        return (500_000.0 if self.theta is None else self.theta), scaling

    def stated(self) -> dict[str, Any]:
        """Return the stated values by setting. The checkpoint determines a theta and factors that are not given."""
        values = dataclasses.asdict(self)
        return {f"rope.{name}": value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Shape of a Llama model. The checkpoint determines values that are None.

    Attributes:
        max_seq_len: For a loaded model, a limit of this run, which may be below the checkpoint's.
        initializer_range: Standard deviation of random weights; ignored for a loaded model.
        gradient_checkpointing: Recompute each whole layer in the backward pass; if false, recompute only what is
            between its matmuls. `trainer.remat` overrides this setting.
    """

    type: str = "llama"
    max_seq_len: int | None = None
    hidden_dim: int | None = None
    intermediate_dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    layer_norm_epsilon: float | None = None
    tie_word_embeddings: bool | None = None
    rope: RopeSettings | None = None
    initializer_range: float = 0.02
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        if self.type != "llama":
            raise ConfigError(f"model.type is {self.type!r}; only llama is supported")

    def stated_shape(self) -> dict[str, Any]:
        """Return the stated values of the shape by setting; empty if the checkpoint determines the whole shape."""
        shape = {name: getattr(self, name) for name in _SHAPE_FIELDS if getattr(self, name) is not None}
        return {**shape, **(self.rope.stated() if self.rope else {})}

    def random_model(self) -> LlamaConfig:
        """Return the shape of a model with random weights.

        Raises:
            ConfigError: A size is missing, or the sizes are incompatible.
        """
        missing = [f"model.{name}" for name in _NEEDED_FOR_RANDOM if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} not set; set them for a model with random weights, "
                "or set initialize_from_hf to a model"
            )
        shape = {field: getattr(self, name) for name, field in _SHAPE_FIELDS.items() if getattr(self, name) is not None}
        shape.setdefault("vocab_size", VOCAB_SIZE)
        shape.setdefault("head_dim", shape["hidden_size"] // shape["num_heads"])
        rope_theta, rope_scaling = (self.rope or RopeSettings()).build()
        rope = {"rope_theta": rope_theta, "rope_scaling": rope_scaling}
        try:
            return LlamaConfig(**shape, **rope, initializer_range=self.initializer_range)
        except ModelError as error:
            raise ConfigError(f"model: {error}") from error


def contradictions(stated: Mapping[str, Any], config: LlamaConfig) -> list[str]:
    """Return one sentence for each value of `stated_shape` that differs from the checkpoint's config."""
    actual = {name: getattr(config, field) for name, field in _SHAPE_FIELDS.items()} | _describe_rope(config)
    found: list[str] = []
    for name, value in stated.items():
        if name == "max_seq_len":
            if value > actual[name]:
                found.append(f"model.max_seq_len is {value}, but the checkpoint's limit is {actual[name]}")
        elif value != actual.get(name):
            found.append(f"model.{name} is {value}, but the checkpoint's config.json has {actual.get(name)}")
    return found


def _describe_rope(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope.type": "default", "rope.theta": config.rope_theta}
    return {
        "rope.type": "llama3",
        "rope.theta": config.rope_theta,
        "rope.factor": scaling.factor,
        "rope.low_freq_factor": scaling.low_freq_factor,
        "rope.high_freq_factor": scaling.high_freq_factor,
        "rope.original_max_position_embeddings": scaling.original_max_seq_len,
    }
