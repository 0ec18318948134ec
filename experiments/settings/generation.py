"""Conversion of generation settings, shared by `inference_eval` of training and `engine` of the sampler."""

from typing import Any

from simpo_pipeline.data.prompts import DEFAULT_TEMPLATE, PromptsConfig
from simpo_pipeline.errors import ConfigError
from simpo_pipeline.inference.config import EngineConfig, SamplingParams, pages_for
from steps.infer import MODES


def build_engine(
    prefix: str,
    *,
    max_new_tokens: int,
    max_seq_len: int | None,
    max_seqs: int | None,
    page_size: int | None,
    max_pages: int | None,
    max_prefill_size: int | None,
    max_rounds: int | None,
) -> EngineConfig:
    """Return an engine's config from settings. `prefix` precedes the names of the settings in messages.

    `EngineConfig` describes the sizes. Three of them have other names there: `max_pages` is `num_pages`,
    `max_prefill_size` is `prefill_chunk_tokens`, and `max_rounds` is `decode_steps_per_call`. The engine derives sizes
    that are None.

    Raises:
        ConfigError: A size is not positive, or is too small for a sequence with `max_new_tokens`.
    """
    sizes = {
        "max_seq_len": max_seq_len,
        "max_seqs": max_seqs,
        "page_size": page_size,
        "max_pages": max_pages,
        "max_prefill_size": max_prefill_size,
        "max_rounds": max_rounds,
    }
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{prefix}{name} must be positive when set, got {size}")
    if max_seq_len is not None and max_seq_len <= max_new_tokens:
        raise ConfigError(
            f"{prefix}max_seq_len is too small: it is {max_seq_len}, but must fit a prompt and "
            f"max_new_tokens={max_new_tokens}; raise {prefix}max_seq_len"
        )
    if max_seq_len is not None and max_rounds is not None and max_rounds > max_seq_len:
        raise ConfigError(f"{prefix}max_rounds must be <= {prefix}max_seq_len, got {max_rounds} > {max_seq_len}")
    if max_pages is not None and page_size is None:
        raise ConfigError(
            f"{prefix}max_pages is {max_pages}, but {prefix}page_size is null, so the size of a page is unknown; set "
            "page_size too, or leave both to the engine"
        )
    if max_seq_len is not None and max_pages is not None and page_size is not None:
        needed = pages_for(max_seq_len, page_size)
        if max_pages < needed:
            raise ConfigError(
                f"{prefix}max_pages={max_pages} is too small for one sequence of max_seq_len={max_seq_len} "
                f"({needed} pages needed at page_size={page_size}). Increase max_pages."
            )
    return EngineConfig(
        max_seqs=max_seqs,
        max_seq_len=max_seq_len,
        page_size=page_size,
        num_pages=max_pages,
        prefill_chunk_tokens=max_prefill_size,
        decode_steps_per_call=EngineConfig.decode_steps_per_call if max_rounds is None else max_rounds,
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
