"""Which job `--preflight` compiles ahead, and for which slice."""

import dataclasses

from simpo_pipeline.data.prompts import PromptsConfig
from simpo_pipeline.inference.config import EngineConfig, SamplingParams
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.preflight.topology import find_topology
from simpo_pipeline.training.config import TrainerConfig


@dataclasses.dataclass(frozen=True)
class PreflightFlags(JobFlags):
    """The flags of an experiment whose programs can be compiled ahead."""

    preflight: str | None = None
    """Compile all that the job would launch for this slice (v5p-16, v5p-32, v5p-64, v5e-16 or v6e-16), say whether it
    fits, and exit with 0 if it does, with 1 if not. Needs no accelerator, but the extra `tpu`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preflight is not None:
            find_topology(self.preflight)


@dataclasses.dataclass(frozen=True)
class PreflightJob:
    """What decides which programs an interleaved job launches; each host generates on its own devices.

    Attributes:
        model: The model's shape; None where only the model's files say it.
        engine_dtype: Of the weights that are generated from.
    """

    model: LlamaConfig | None
    trainer: TrainerConfig
    prompts: PromptsConfig
    sampling: SamplingParams
    engine: EngineConfig
    engine_dtype: str
