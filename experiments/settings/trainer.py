"""Settings under `trainer`: how long, how large, in which dtypes, and where metrics go."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.job.main import TrackerChoice
from simpo_pipeline.tracking.factory import TrackerKind

Dtype = Literal["float32", "bfloat16"]
# The names that mixed-precision policies are written with.
_DTYPES: Mapping[str, Dtype] = {
    "f32": "float32",
    "float32": "float32",
    "full": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
# What `trainer.tracker.type` may be, and the tracker it stands for.
TRACKERS: Mapping[str, TrackerKind] = {"wandb": "wandb", "jsonl": "jsonl", "noop": "none", "none": "none"}


@dataclasses.dataclass(frozen=True)
class TrackerSettings:
    """Where metrics go besides the step outputs: `wandb`, `jsonl`, or nowhere (`noop`)."""

    type: str = "jsonl"
    project: str = "simpo-pipeline"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.type not in TRACKERS:
            raise ConfigError(f"trainer.tracker.type is {self.type!r}; allowed is one of {', '.join(TRACKERS)}")

    def choice(self, default_name: str) -> TrackerChoice:
        """Return what `main` takes; `default_name` names the run where the settings do not."""
        return TrackerChoice(TRACKERS[self.type], self.name or default_name, self.project)


def parse_precision(policy: str) -> tuple[Dtype, Dtype]:
    """(parameter dtype, compute dtype) of a policy like `p=f32,c=bfloat16`; a bare dtype is both.

    Raises:
        ConfigError: the policy or a dtype in it is not one of those known here.
    """
    parts = [part.strip().partition("=") for part in policy.split(",")]
    by_role = {"p": policy, "c": policy} if "=" not in policy else {role: dtype for role, _, dtype in parts}
    if not {"p", "c"} <= by_role.keys() <= {"p", "c", "o"} or any(dtype not in _DTYPES for dtype in by_role.values()):
        raise ConfigError(
            f"trainer.mp is {policy!r}; write p=DTYPE,c=DTYPE (parameters, computation) with dtypes f32 or bfloat16"
        )
    return _DTYPES[by_role["p"]], _DTYPES[by_role["c"]]


@dataclasses.dataclass(frozen=True)
class TrainerSettings:
    """One training run.

    Attributes:
        num_train_steps: Updates of the whole run.
        train_batch_size: Pairs an update.
        seed: Of the data's order and of random weights.
        mp: Precision; master weights are float32, so only the dtype of the computation is free.
        packing, grad_accumulation, ema_decay: As `TrainerConfig` has them.
        remat: As `TrainerConfig` has it; None is "full", or "products" where model.gradient_checkpointing is false.
        tensor_parallel: Over so many neighbouring devices each matrix is split, besides the split over all others.
        steps_per_eval: Held-out pairs are evaluated before the first update and after every so many.
    """

    num_train_steps: int
    train_batch_size: int
    seed: int = 0
    mp: str = "f32"
    packing: bool = False
    grad_accumulation: int = 1
    remat: str | None = None
    ema_decay: float | None = None
    tensor_parallel: int = 1
    steps_per_eval: int | None = None
    tracker: TrackerSettings = dataclasses.field(default_factory=TrackerSettings)

    def __post_init__(self) -> None:
        if self.num_train_steps < 1:
            raise ConfigError(f"trainer.num_train_steps must be positive, got {self.num_train_steps}")
        if self.train_batch_size < 1:
            raise ConfigError(f"trainer.train_batch_size must be positive, got {self.train_batch_size}")
        for name in ("tensor_parallel", "steps_per_eval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"trainer.{name} must be positive, got {value}")
        if parse_precision(self.mp)[0] != "float32":
            raise ConfigError(f"trainer.mp is {self.mp!r}; master weights are float32: write p=f32,c=bfloat16 or f32")

    @property
    def compute_dtype(self) -> Dtype:
        """The dtype of the forward and backward pass, and of generation."""
        return parse_precision(self.mp)[1]
