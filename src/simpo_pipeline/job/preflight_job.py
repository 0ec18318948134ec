"""The job that `--preflight` compiles, and the slice to compile it for."""

import dataclasses

from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.preflight.topology import find_topology
from simpo_pipeline.training.config import TrainerConfig


@dataclasses.dataclass(frozen=True)
class PreflightFlags(JobFlags):
    """Flags of an experiment whose programs can be compiled in advance."""

    preflight: str | None = None
    """Compile all programs of the job for this slice (v5p-16, v5p-32, v5p-64, v5e-16 or v6e-16), report whether they
    fit, and exit with 0 if they do, otherwise with 1. Needs the extra `tpu`, but no accelerator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preflight is not None:
            find_topology(self.preflight)


@dataclasses.dataclass(frozen=True)
class PreflightJob:
    """Configs that determine the programs of an interleaved job, in which each host generates on its own devices.

    Attributes:
        model: Shape of the model; None if it is unknown until the model's files are read.
        engine_dtype: Data type of the engine's weights.
    """

    model: LlamaConfig | None
    trainer: TrainerConfig
    prompts: PromptsConfig
    sampling: SamplingParams
    engine: EngineConfig
    engine_dtype: str
