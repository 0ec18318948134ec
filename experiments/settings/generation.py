"""Conversion of generation settings, shared by `inference_eval` of training and `engine` of the sampler."""

import dataclasses
from typing import Any

from simpo_pipeline.data.prompts import DEFAULT_TEMPLATE, PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams, pages_for
from steps.infer import MODES


@dataclasses.dataclass(frozen=True)
class EngineKnobs:
    """Sizes of an engine under the names of the settings. The engine derives sizes that are None.

    Attributes:
        section: Section of the settings file, for messages.
        max_seq_len: Maximum number of tokens of a sequence, prompt and generated tokens together.
        max_seqs: Maximum number of sequences that decode together.
        page_size: Number of tokens per page of the cache.
        max_pages: Number of pages of the cache.
        max_prefill_size: Number of prompt tokens that are computed at once.
        max_rounds: Number of tokens that a sequence may draw per device call.
    """

    section: str
    max_seq_len: int | None
    max_seqs: int | None
    page_size: int | None
    max_pages: int | None
    max_prefill_size: int | None
    max_rounds: int | None

    def build(self, max_new_tokens: int) -> EngineConfig:
        """Return the engine's config.

        Raises:
            ConfigError: A size is not positive, or is too small for a sequence with `max_new_tokens`.
        """
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "section" and size is not None and size < 1:
                raise ConfigError(f"{self.section}.{field.name} must be positive when set, got {size}")
        if self.max_seq_len is not None:
            self._check_length(self.max_seq_len, max_new_tokens)
        if self.max_pages is not None and self.page_size is None:
            raise ConfigError(
                f"{self.section}.max_pages is {self.max_pages}, but {self.section}.page_size is null, so the "
                "size of a page is unknown; set page_size too, or leave both to the engine"
            )
        given = {"prefill_chunk_tokens": self.max_prefill_size, "decode_steps_per_call": self.max_rounds}
        return EngineConfig(
            max_seqs=self.max_seqs,
            max_seq_len=self.max_seq_len,
            page_size=self.page_size,
            num_pages=self.max_pages,
            **{name: size for name, size in given.items() if size is not None},
        )

    def _check_length(self, max_seq_len: int, max_new_tokens: int) -> None:
        if max_seq_len <= max_new_tokens:
            raise ConfigError(
                f"{self.section}.max_seq_len is too small: it is {max_seq_len}, but must fit a prompt and "
                f"max_new_tokens={max_new_tokens}; raise {self.section}.max_seq_len"
            )
        if self.max_rounds is not None and self.max_rounds > max_seq_len:
            raise ConfigError(
                f"{self.section}.max_rounds must be <= {self.section}.max_seq_len, got {self.max_rounds} > "
                f"{max_seq_len}"
            )
        if self.max_pages is None or self.page_size is None:
            return
        needed = pages_for(max_seq_len, self.page_size)
        if self.max_pages < needed:
            raise ConfigError(
                f"{self.section}.max_pages={self.max_pages} is too small for one sequence of max_seq_len="
                f"{max_seq_len} ({needed} pages needed at page_size={self.page_size}). Increase max_pages."
            )


def build_sampling(prefix: str, *, max_new_tokens: int, **fields: Any) -> SamplingParams:
    """Return sampling parameters from settings. `prefix` precedes the names of the settings in messages.

    Raises:
        ConfigError: The value of a setting is invalid.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"{prefix}max_new_tokens must be at least 1, got {max_new_tokens}")
    try:
        return SamplingParams(max_tokens=max_new_tokens, **fields)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def build_prompts(
    prefix: str,
    *,
    prompts: tuple[str, ...] | None = None,
    prompts_path: str | None = None,
    synthetic_prompt_count: int | None = None,
    synthetic_prompt_template: str = DEFAULT_TEMPLATE,
) -> PromptsConfig:
    """Return the prompts, which are given in exactly one way. `prefix` precedes the names of the settings in messages.

    Raises:
        ConfigError: No way or several ways are given, or the given one has no prompts.
    """
    if not prompts and prompts_path is None and synthetic_prompt_count is None:
        raise ConfigError(f"{prefix}prompts must be non-empty when prompts_path and synthetic_prompt_count are unset.")
    if synthetic_prompt_count is not None and synthetic_prompt_count < 1:
        raise ConfigError(f"{prefix}synthetic_prompt_count must be positive, got {synthetic_prompt_count}")
    return PromptsConfig(prompts or (), prompts_path, synthetic_prompt_count, synthetic_prompt_template)


def require_mode(key: str, mode: str) -> None:
    """Check that an inference mode exists.

    Raises:
        ConfigError: The mode is unknown.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown {key}={mode!r}. Expected one of: {', '.join(MODES)}")
