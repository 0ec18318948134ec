"""Prompts to generate from, and the shard of them that one host serves.

This module knows text and indices. It does not know tokenizers, models or processes.
"""

import dataclasses

from simpo_pipeline.errors import ConfigError, DataError
from simpo_pipeline.storage.files import exists, read_text

DEFAULT_TEMPLATE = "Synthetic prompt {index}: explain one key concept in machine learning."


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """The source of prompts; exactly one of the three sources must be set.

    Attributes:
        prompts: The prompts themselves.
        prompts_path: A UTF-8 text file at any storage path, with one prompt per line. Empty lines are skipped.
        synthetic_prompt_count: Number of prompts to generate from `synthetic_prompt_template`.
        synthetic_prompt_template: A format string with the field `{index}`, which counts from 0.
    """

    prompts: tuple[str, ...] = ()
    prompts_path: str | None = None
    synthetic_prompt_count: int | None = None
    synthetic_prompt_template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        given = [bool(self.prompts), self.prompts_path is not None, self.synthetic_prompt_count is not None]
        if sum(given) != 1:
            raise ConfigError(
                f"exactly one of prompts, prompts_path and synthetic_prompt_count must be set, got {sum(given)} of them"
            )
        if self.synthetic_prompt_count is not None and self.synthetic_prompt_count < 1:
            raise ConfigError(f"synthetic_prompt_count must be positive, got {self.synthetic_prompt_count}")
        blank = [index for index, prompt in enumerate(self.prompts) if not prompt.strip()]
        if blank:
            raise ConfigError(f"prompts[{blank[0]}] is empty; give every prompt some text or leave it out")
        self._expand_template(0)

    @property
    def count(self) -> int | None:
        """Number of prompts; None if it depends on the file at `prompts_path`."""
        return self.synthetic_prompt_count if not self.prompts else len(self.prompts)

    def _expand_template(self, index: int) -> str:
        try:
            return self.synthetic_prompt_template.format(index=index)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"synthetic_prompt_template {self.synthetic_prompt_template!r} cannot be filled ({error!r}); "
                "its only field is {index}, and literal braces must be doubled"
            ) from error


def load_prompts(config: PromptsConfig) -> tuple[str, ...]:
    """Return all prompts of the job, in global order.

    Raises:
        DataError: `prompts_path` does not exist or contains no prompt.
    """
    if config.prompts:
        return config.prompts
    if config.synthetic_prompt_count is not None:
        return tuple(config._expand_template(index) for index in range(config.synthetic_prompt_count))
    assert config.prompts_path is not None
    if not exists(config.prompts_path):
        raise DataError(f"prompts_path does not exist: {config.prompts_path}")
    lines = tuple(line.strip() for line in read_text(config.prompts_path).splitlines() if line.strip())
    if not lines:
        raise DataError(f"prompts_path contains no non-empty prompts: {config.prompts_path}; write one prompt a line")
    return lines


def prompt_shard(num_prompts: int, process_index: int, process_count: int) -> range:
    """Return the contiguous indices `[i*n//p, (i+1)*n//p)` that process i of p serves.

    Shards may differ in size or be empty.

    Raises:
        ConfigError: `process_count` is below 1, or `process_index` is not in [0, process_count).
    """
    if process_count < 1:
        raise ConfigError(f"process_count must be positive, got {process_count}")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index} out of range for process_count={process_count}")
    start = process_index * num_prompts // process_count
    stop = (process_index + 1) * num_prompts // process_count
    return range(start, stop)
