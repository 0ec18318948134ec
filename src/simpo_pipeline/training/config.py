"""What a SimPO run is: its loss, its optimizer, its length. Frozen, checked at construction, free of jax.

One `TrainerConfig` describes the WHOLE run. Steps of an experiment that each train a part of it (updates 1..2, then
3..7) share one config: the learning rate follows one schedule over `num_train_steps`, whoever asks for the updates.

This module does not know the model, the data or the devices: what depends on them (sequence longer than the model,
batch not divisible by the mesh) is checked where they meet, in `trainer`.
"""

import math
from dataclasses import dataclass, field

from simpo_pipeline.errors import ConfigError

COMPUTE_DTYPES = ("float32", "bfloat16")
LR_SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class SimpoConfig:
    """The two constants of SimPO, in the convention of Meng et al. 2024 (arXiv 2405.14734).

    `gamma_beta_ratio` is the target margin between the two average log-probs, in nats per token; the paper's
    absolute margin is `gamma = beta * gamma_beta_ratio`. See `simpo` for other projects' conventions.
    """

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5

    def __post_init__(self):
        _require_positive("simpo.beta", self.beta)
        _require_at_least_zero("simpo.gamma_beta_ratio", self.gamma_beta_ratio)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, clipping by global norm, and one schedule over the whole run.

    `warmup` below 1 is a fraction of the run's updates, rounded down; from 1 on it is a number of updates.
    `lr_schedule` is one of `LR_SCHEDULES`; `min_lr_ratio * learning_rate` is where the decay ends.
    """

    learning_rate: float = 6e-7
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    warmup: float = 0.1
    lr_schedule: str = "cosine"
    min_lr_ratio: float = 0.0

    def __post_init__(self):
        _require_positive("optimizer.learning_rate", self.learning_rate)
        _require_at_least_zero("optimizer.weight_decay", self.weight_decay)
        _require_fraction("optimizer.beta1", self.beta1, below_one=True)
        _require_fraction("optimizer.beta2", self.beta2, below_one=True)
        _require_positive("optimizer.epsilon", self.epsilon)
        _require_positive("optimizer.max_grad_norm", self.max_grad_norm)
        _require_at_least_zero("optimizer.warmup", self.warmup)
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ConfigError(
                f"optimizer.warmup is {self.warmup}: give a fraction of the run below 1, or a whole number of updates."
            )
        _require_choice("optimizer.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _require_fraction("optimizer.min_lr_ratio", self.min_lr_ratio, below_one=False)

    def warmup_steps(self, num_train_steps: int) -> int:
        """Updates during which the learning rate rises, in a run of `num_train_steps` updates."""
        return int(self.warmup * num_train_steps) if self.warmup < 1 else int(self.warmup)


@dataclass(frozen=True)
class TrainerConfig:
    """One SimPO run from its first update to its last.

    `train_batch_size` counts pairs per update, `train_seq_len` tokens per response with its prompt.
    Master weights and moments are float32 whatever `compute_dtype` (one of `COMPUTE_DTYPES`) is. `remat` recomputes
    each layer in the backward pass instead of keeping its matrix products. `logprob_chunk_size` is how many vocabulary
    entries' logits exist at a time, for all tokens of the batch.
    """

    num_train_steps: int
    train_batch_size: int
    train_seq_len: int
    seed: int = 0
    compute_dtype: str = "float32"
    remat: bool = False
    logprob_chunk_size: int = 4096
    simpo: SimpoConfig = field(default_factory=SimpoConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        _require_count("num_train_steps", self.num_train_steps)
        _require_count("train_batch_size", self.train_batch_size)
        _require_count("train_seq_len", self.train_seq_len)
        if self.train_seq_len < 2:
            raise ConfigError(
                "train_seq_len is 1: a position predicts the token after it, so give at least 2 tokens per sequence."
            )
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}: give an integer from 0 to 2**64 - 1.")
        _require_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _require_count("logprob_chunk_size", self.logprob_chunk_size)
        warmup_steps = self.optimizer.warmup_steps(self.num_train_steps)
        if warmup_steps >= self.num_train_steps:
            raise ConfigError(
                f"optimizer.warmup is {warmup_steps} updates of a run of {self.num_train_steps}: the learning rate "
                "would never reach its peak. Lower optimizer.warmup or raise num_train_steps."
            )


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}: give a finite number above 0.")


def _require_at_least_zero(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} is {value}: give a finite number of at least 0.")


def _require_fraction(name: str, value: float, *, below_one: bool) -> None:
    if not (0 <= value < 1 or (value == 1 and not below_one)):
        raise ConfigError(f"{name} is {value}: give a number from 0 to 1{' (1 excluded)' if below_one else ''}.")


def _require_count(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}: give an integer of at least 1.")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}: give one of {', '.join(choices)}.")
