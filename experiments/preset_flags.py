"""The flags of experiments that have presets."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from experiments.keeping import Keeping
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.preflight_job import PreflightFlags

PresetT = TypeVar("PresetT")


@dataclasses.dataclass(frozen=True)
class PresetFlags(JobFlags):
    """The flags of a job, and the name of a preset."""

    preset: str | None = None
    """One of the experiment's presets; an unknown name lists them."""

    def choose(self, presets: Mapping[str, PresetT], *, default: str) -> tuple[str, PresetT]:
        """Return the name of the preset to run, and the preset.

        Raises:
            ConfigError: There is no preset of that name.
        """
        name = self.preset if self.preset is not None else default
        if name not in presets:
            raise ConfigError(f"--preset {name!r} is unknown; choose one of {', '.join(presets)}")
        return name, presets[name]


@dataclasses.dataclass(frozen=True)
class InterleaveFlags(PresetFlags, PreflightFlags, Keeping):
    """The flags of an interleaved run: a preset, `--preflight`, and what the run keeps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Keeping.__post_init__(self)
