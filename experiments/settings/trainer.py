"""Settings under `trainer`: length of the run, batch size, precision, and where metrics go."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.job.main import TrackerChoice
from simpo_pipeline.tracking.factory import TrackerKind

Dtype = Literal["float32", "bfloat16"]
# Names of data types in mixed-precision policies.
_DTYPES: Mapping[str, Dtype] = {
    "f32": "float32",
    "float32": "float32",
    "full": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}
# Values of `trainer.tracker.type`, and the trackers that they select.
TRACKERS: Mapping[str, TrackerKind] = {"wandb": "wandb", "jsonl": "jsonl", "noop": "none", "none": "none"}


@dataclasses.dataclass(frozen=True)
class TrackerSettings:
    """Where metrics go in addition to the step outputs: `wandb`, `jsonl`, or nowhere (`noop`)."""

    type: str = "jsonl"
    project: str = "simpo-pipeline"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.type not in TRACKERS:
            raise ConfigError(f"trainer.tracker.type is {self.type!r}; expected one of {', '.join(TRACKERS)}")

    def choice(self, default_name: str) -> TrackerChoice:
        """Return the tracker for `main`. `default_name` is the name of the run if the settings have none."""
        return TrackerChoice(TRACKERS[self.type], self.name or default_name, self.project)


def parse_precision(policy: str) -> tuple[Dtype, Dtype]:
    """Return (parameter dtype, compute dtype) of a policy like `p=f32,c=bfloat16`. A bare dtype sets both.

    Raises:
        ConfigError: The policy, or a dtype in it, is unknown.
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
        num_train_steps: Number of updates of the whole run.
        train_batch_size: Number of pairs per update.
        seed: Seed of the order of the data and of random weights.
        mp: Precision. Master weights are always float32; only the compute dtype can be chosen.
        packing, grad_accumulation, ema_decay: See `TrainerConfig`.
        remat: See `TrainerConfig`. None means "full", or "products" if model.gradient_checkpointing is false.
        tensor_parallel: Number of neighboring devices over which each matrix is sharded, in addition to the sharding
            over all other devices.
        steps_per_eval: Number of updates between two evaluations of the held-out pairs. They are also evaluated before
            the first update.
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
        """Data type of the forward and backward pass, and of generation."""
        return parse_precision(self.mp)[1]
