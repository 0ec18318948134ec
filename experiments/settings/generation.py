"""What settings of generation mean to the engine, shared by training's `inference_eval` and the sampler's `engine`."""

import dataclasses
from typing import Any

from simpo_pipeline.data.prompts import DEFAULT_TEMPLATE, PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams, pages_for
from steps.infer import MODES


@dataclasses.dataclass(frozen=True)
class EngineKnobs:
    """Sizes of an engine as settings name them; None leaves one to the engine, which knows prompts and memory.

    Attributes:
        section: Where the knobs stand in the file, for messages.
        max_seq_len: Tokens of the longest sequence, prompt and generated together.
        max_seqs: Sequences that decode together.
        page_size: Tokens of a page of the cache.
        max_pages: Pages of the cache.
        max_prefill_size: Prompt tokens computed at once.
        max_rounds: Tokens a sequence may draw in one device call.
    """

    section: str
    max_seq_len: int | None
    max_seqs: int | None
    page_size: int | None
    max_pages: int | None
    max_prefill_size: int | None
    max_rounds: int | None

    def build(self, max_new_tokens: int) -> EngineConfig:
        """The engine's own config.

        Raises:
            ConfigError: a size is not positive, or too small for a sequence with `max_new_tokens`.
        """
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "section" and size is not None and size < 1:
                raise ConfigError(f"{self.section}.{field.name} must be positive when set, got {size}")
        if self.max_seq_len is not None:
            self._check_length(self.max_seq_len, max_new_tokens)
        if self.max_pages is not None and self.page_size is None:
            raise ConfigError(
                f"{self.section}.max_pages is {self.max_pages}, but {self.section}.page_size is null, so nobody knows "
                "how large they are; set it too, or leave both to the engine"
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
                f"{self.section}.max_seq_len is too small: it is {max_seq_len} and must hold a prompt and "
                f"max_new_tokens={max_new_tokens}; raise it"
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
    """Sampling parameters from knobs; `prefix` stands before the knobs' names in messages.

    Raises:
        ConfigError: a knob's value means nothing.
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
    """The prompts of the one way that is given; `prefix` stands before the knobs' names in messages.

    Raises:
        ConfigError: none or several ways are given, or one gives no prompt.
    """
    if not prompts and prompts_path is None and synthetic_prompt_count is None:
        raise ConfigError(f"{prefix}prompts must be non-empty when prompts_path and synthetic_prompt_count are unset.")
    if synthetic_prompt_count is not None and synthetic_prompt_count < 1:
        raise ConfigError(f"{prefix}synthetic_prompt_count must be positive, got {synthetic_prompt_count}")
    return PromptsConfig(prompts or (), prompts_path, synthetic_prompt_count, synthetic_prompt_template)


def require_mode(key: str, mode: str) -> None:
    """Refuse an inference mode that does not exist.

    Raises:
        ConfigError: the mode is unknown.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown {key}={mode!r}. Expected one of: {', '.join(MODES)}")
