"""How tokens are drawn, and how large the engine is.

Imports no jax, so that plans can hold these without paying for it. Sizes of the engine never change a token.
"""

import dataclasses
import math

from simpo_pipeline.errors import ConfigError

# Compared with each drawn token on the device, in an array of this width.
MAX_STOP_TOKENS = 8
# Alternatives to each token that a program can report, as many as vLLM's default.
MAX_LOGPROBS = 20
# Of numbers that go to the device as int32, and the least divisor of logits, which float32 must hold afterwards.
_LARGEST_INT, _LEAST = 2**31 - 1, 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one prompt's samples are drawn and when each ends; names as in vLLM.

    Filters apply in the order of Hugging Face: repetition penalty, temperature, top_k, top_p, min_p. Each keeps tokens
    as likely as the last one it keeps.

    Attributes:
        max_tokens: A sample ends with finish reason "length" when it has this many tokens.
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Tokens are drawn from so many likeliest ones; 0 keeps every token.
        top_p: Tokens are drawn from the smallest set of likeliest tokens with at least this probability.
        min_p: Tokens less likely than this times the likeliest one are left out.
        repetition_penalty: Logits of tokens in the prompt or drawn before are divided by it where positive, multiplied
            where negative (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
        n: Samples of each prompt.
        seed: 32 bits; with the step, the prompt's and the sample's index and the position, it makes each token's key.
        stop_token_ids: A sample ends with finish reason "stop" when it draws one of these.
        stop: A sample ends with finish reason "stop_string" when its text contains one of these strings.
        min_tokens: Before a sample has so many tokens, stop tokens are not drawn and stop strings do not end it.
        ignore_eos: The end of the turn and the tokenizer's EOS, which else are stop tokens too, do not end a sample.
        logprobs: None for none; else each drawn token comes with its log-probability under the model (before penalty,
            temperature and filters) and with those of so many likeliest tokens.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature must be a finite number of at least 0 (0 is greedy), got {self.temperature}"
            )
        if 0 < self.temperature < _LEAST:
            raise ConfigError(f"temperature must be 0 (greedy) or at least {_LEAST}, got {self.temperature}")
        if not 0 <= self.top_k <= _LARGEST_INT:
            raise ConfigError(f"top_k must lie in [0, {_LARGEST_INT}] (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1] (1 keeps every token), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1] (0 keeps every token), got {self.min_p}")
        if not _LEAST <= self.repetition_penalty <= 1 / _LEAST:
            raise ConfigError(
                f"repetition_penalty must lie in [{_LEAST}, {1 / _LEAST}] (1 is none), got {self.repetition_penalty}"
            )
        if self.n < 1:
            raise ConfigError(f"n must be at least 1, got {self.n}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in [0, 2**32), got {self.seed}")
        self._check_ends()
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs must be None or lie in [0, {MAX_LOGPROBS}], got {self.logprobs}")

    def _check_types(self) -> None:
        for name in ("max_tokens", "top_k", "n", "seed", "min_tokens"):
            _require_whole(name, getattr(self, name))
        if self.logprobs is not None:
            _require_whole("logprobs", self.logprobs)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        for name in ("stop_token_ids", "stop"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ConfigError(f"{name} must be a tuple, () for none, got {getattr(self, name)!r}")
        for token in self.stop_token_ids:
            _require_whole("each of stop_token_ids", token)
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")

    def _check_ends(self) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ConfigError(f"at most {MAX_STOP_TOKENS} stop_token_ids are supported, got {len(self.stop_token_ids)}")
        if any(token < 0 for token in self.stop_token_ids):
            raise ConfigError(f"stop_token_ids must not be negative, got {list(self.stop_token_ids)}")
        if not all(isinstance(string, str) and string for string in self.stop):
            raise ConfigError(f"stop must be a tuple of strings that are not empty, got {self.stop!r}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens must lie in [0, max_tokens={self.max_tokens}], got {self.min_tokens}")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of one engine as they are asked for; what is None is derived from memory and work (`sizing`).

    Attributes:
        max_seqs: Sequences that decode together at most, 256 if None; no more than there are.
        max_seq_len: Tokens of the longest sequence, prompt and generated together; None for the longest there is.
        page_size: Tokens of one sequence whose keys and values lie together; None for what suits the devices.
        num_pages: Pages in the cache; None for what the work can fill and memory can hold.
        prefill_chunk_tokens: Prompt tokens computed in one program; longer prompts take several. None for 2,048, or
            what there is.
        decode_steps_per_call: Tokens a sequence may draw before the host looks at them.
        memory_utilization: Share of the free memory of a device that weights, cache and programs may take.
    """

    max_seqs: int | None = None
    max_seq_len: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    prefill_chunk_tokens: int | None = None
    decode_steps_per_call: int = 32
    memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if field.name != "memory_utilization" and size is not None:
                _require_whole(f"engine.{field.name}", size)
                if size < 1:
                    raise ConfigError(f"engine.{field.name} must be at least 1, got {size}")
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(f"engine.memory_utilization must lie in (0, 1], got {self.memory_utilization}")


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """Sizes of one engine, all known; fields as in `EngineConfig`. They never change a token."""

    max_seqs: int
    max_seq_len: int
    page_size: int
    num_pages: int
    prefill_chunk_tokens: int = 512
    decode_steps_per_call: int = 16

    @property
    def pages_per_seq(self) -> int:
        """Pages that a sequence of `max_seq_len` tokens fills."""
        return pages_for(self.max_seq_len, self.page_size)

    @property
    def max_prefill_seqs(self) -> int:
        """Sequences whose prompts share one prefill: as many as 16 tokens of each allow."""
        return min(self.max_seqs, pages_for(self.prefill_chunk_tokens, 16))


def _require_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that `num_tokens` tokens of one sequence fill, the last one perhaps in part."""
    return -(-num_tokens // page_size)
