"""Configuration of a SimPO run: its loss, its optimizer, its length. Frozen, checked at construction, free of jax.

One `TrainerConfig` describes the WHOLE run. Steps of an experiment that each train one phase of it (updates 1..2, then
3..7) share one config: the learning rate follows one schedule over `num_train_steps`, whichever step runs the updates.

This module does not know the model, the data or the devices. Constraints that involve them (a sequence longer than the
model allows, a batch not divisible by the mesh) are checked in `trainer`.
"""

import math
from dataclasses import dataclass, field

from simpo_pipeline.errors import ConfigError

COMPUTE_DTYPES = ("float32", "bfloat16")
MOMENT_DTYPES = ("float32", "bfloat16")
LR_SCHEDULES = ("cosine", "linear", "wsd", "constant")
LOSS_TYPES = ("sigmoid", "hinge")
# Values that the forward pass keeps of each layer for the backward pass; the rest is recomputed.
REMAT_POLICIES = ("full", "products", "none")
CHECKPOINT_TIMES = ("never", "every", "on_failure")


@dataclass(frozen=True)
class SimpoConfig:
    """The loss: SimPO's two constants, in the convention of Meng et al. 2024 (arXiv 2405.14734), and its variants.

    `gamma_beta_ratio` is the target margin between the two average log-probs, in nats per token; the paper's
    absolute margin is `gamma = beta * gamma_beta_ratio`. See `simpo` for formulas and other projects' conventions.

    Attributes:
        loss_type: One of `LOSS_TYPES`.
        label_smoothing: Assumed share of pairs whose answers are swapped; needs loss_type "sigmoid".
        sft_weight: Weight of the chosen answers' cross entropy in nats per token (CPO's alpha); 0 disables it.
        z_loss_weight: Weight of the mean square of the log-normalizer over answer tokens; 0 disables it.
    """

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    z_loss_weight: float = 0.0

    def __post_init__(self):
        _require_positive("simpo.beta", self.beta)
        _require_at_least_zero("simpo.gamma_beta_ratio", self.gamma_beta_ratio)
        _require_choice("simpo.loss_type", self.loss_type, LOSS_TYPES)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"simpo.label_smoothing is {self.label_smoothing}: give a number from 0 to below 0.5.")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(
                f"simpo.label_smoothing is {self.label_smoothing} with loss_type {self.loss_type!r}: only the sigmoid "
                "loss supports it. Set it to 0, or set loss_type to 'sigmoid'."
            )
        _require_at_least_zero("simpo.sft_weight", self.sft_weight)
        _require_at_least_zero("simpo.z_loss_weight", self.z_loss_weight)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, clipping by global norm, and one schedule over the whole run.

    `warmup` below 1 is a fraction of the run's updates, rounded down; 1 or more is a number of updates.
    `lr_schedule` is one of `LR_SCHEDULES`; `min_lr_ratio * learning_rate` is the final value of the decay. "wsd"
    (warm-up, stable, decay) decays linearly over the last updates only; `decay` counts these as `warmup` does.
    `moment_dtype` is the dtype of Adam's first moment. The second moment is float32, because bfloat16 would round away
    its increments.
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
    decay: float = 0.2
    moment_dtype: str = "float32"

    def __post_init__(self):
        _require_positive("optimizer.learning_rate", self.learning_rate)
        _require_at_least_zero("optimizer.weight_decay", self.weight_decay)
        _require_fraction("optimizer.beta1", self.beta1, below_one=True)
        _require_fraction("optimizer.beta2", self.beta2, below_one=True)
        _require_positive("optimizer.epsilon", self.epsilon)
        _require_positive("optimizer.max_grad_norm", self.max_grad_norm)
        _require_at_least_zero("optimizer.warmup", self.warmup)
        _require_at_least_zero("optimizer.decay", self.decay)
        for name in ("warmup", "decay"):
            length = getattr(self, name)
            if length >= 1 and length != int(length):
                raise ConfigError(
                    f"optimizer.{name} is {length}: give a fraction of the run below 1, or a whole number of updates."
                )
        _require_choice("optimizer.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _require_choice("optimizer.moment_dtype", self.moment_dtype, MOMENT_DTYPES)
        _require_fraction("optimizer.min_lr_ratio", self.min_lr_ratio, below_one=False)

    def warmup_steps(self, num_train_steps: int) -> int:
        """Return the number of updates during which the learning rate rises, in a run of `num_train_steps` updates."""
        return _updates(self.warmup, num_train_steps)

    def decay_steps(self, num_train_steps: int) -> int:
        """Return the number of updates during which the learning rate falls, in a run of `num_train_steps` updates."""
        if self.lr_schedule == "wsd":
            return _updates(self.decay, num_train_steps)
        return num_train_steps - self.warmup_steps(num_train_steps)


@dataclass(frozen=True)
class TrainerConfig:
    """One SimPO run from its first update to its last.

    `train_batch_size` counts pairs per update. `train_seq_len` counts tokens per response, including its prompt.
    Master weights are float32 for any `compute_dtype` (one of `COMPUTE_DTYPES`).

    Attributes:
        packing: Pairs share rows, and the two answers of a pair share its prompt (`data.rows`); otherwise each
            sequence has a row of `train_seq_len` tokens. The results are equal up to rounding.
        grad_accumulation: Number of parts (microbatches) of an update's batch, which go through the model one after the
            other. Their gradients are summed in float32. This saves memory; the results are equal up to rounding.
        remat: Rematerialization policy. "full" keeps each layer's input for the backward pass and recomputes everything
            else, "products" also keeps the results of its matmuls, "none" keeps everything.
        logprob_chunk_size: Number of vocabulary entries whose logits exist at a time, for all tokens of a part.
        ema_decay: Decay per update of an exponential moving average of the weights; None disables the average.
    """

    num_train_steps: int
    train_batch_size: int
    train_seq_len: int
    seed: int = 0
    compute_dtype: str = "float32"
    packing: bool = False
    grad_accumulation: int = 1
    remat: str = "products"
    logprob_chunk_size: int = 4096
    ema_decay: float | None = None
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
        _require_count("grad_accumulation", self.grad_accumulation)
        if self.train_batch_size % self.grad_accumulation:
            raise ConfigError(
                f"train_batch_size is {self.train_batch_size} pairs and grad_accumulation {self.grad_accumulation}: "
                "give a number of parts that divides the batch."
            )
        _require_choice("remat", self.remat, REMAT_POLICIES)
        _require_count("logprob_chunk_size", self.logprob_chunk_size)
        if self.ema_decay is not None:
            _require_fraction("ema_decay", self.ema_decay, below_one=True)
        warmup_steps = self.optimizer.warmup_steps(self.num_train_steps)
        if warmup_steps >= self.num_train_steps:
            raise ConfigError(
                f"optimizer.warmup is {warmup_steps} updates of a run of {self.num_train_steps}: the learning rate "
                "would never reach its peak. Lower optimizer.warmup or raise num_train_steps."
            )
        decay_steps = self.optimizer.decay_steps(self.num_train_steps)
        if warmup_steps + decay_steps > self.num_train_steps:
            raise ConfigError(
                f"optimizer.warmup is {warmup_steps} and optimizer.decay {decay_steps} updates of a run of "
                f"{self.num_train_steps}: lower one of them or raise num_train_steps."
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is written, so that a killed job can resume from it; it does not change any result.

    Attributes:
        when: One of `CHECKPOINT_TIMES`. "every": after each `every` updates, and at the end of a phase whose trainer
            stays live. "on_failure": when a phase fails or is asked to stop between two updates, in a job of one
            process. "never": a job that was killed recomputes the state.
        every: Number of updates between two checkpoints; for "every" only.
        keep: Number of finished checkpoints of a phase to keep, newest first. One more exists while it is written.
    """

    when: str = "never"
    every: int | None = None
    keep: int = 1

    def __post_init__(self):
        _require_choice("checkpoint.when", self.when, CHECKPOINT_TIMES)
        if (self.when == "every") != (self.every is not None):
            raise ConfigError(
                f"checkpoint.when is {self.when!r} and checkpoint.every {self.every}: set checkpoint.every to "
                "a number of updates if when is 'every', and only then."
            )
        if self.every is not None:
            _require_count("checkpoint.every", self.every)
        _require_count("checkpoint.keep", self.keep)


def _updates(length: float, num_train_steps: int) -> int:
    # 0.29 * 100 is a little less than 29.
    return int(length * num_train_steps + 1e-9) if length < 1 else int(length)


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
