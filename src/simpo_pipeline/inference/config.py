"""Sampling parameters and engine sizes.

This module does not import JAX, so planning code can use these classes without the cost of that import. Engine sizes
never change the generated tokens.
"""

import dataclasses
import math

from simpo_pipeline.errors import ConfigError

# Width of the array of stop token ids that each sampled token is compared with on the device.
MAX_STOP_TOKENS = 8
# Maximum number of top log-probabilities that a program reports per token; vLLM's default.
MAX_LOGPROBS = 20
# The largest int32, for values sent to the device, and the smallest divisor of logits whose quotients fit float32.
_MAX_INT32, _MIN_DIVISOR = 2**31 - 1, 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters and stop conditions of one prompt's samples; names as in vLLM.

    Filters apply in the order of Hugging Face: repetition penalty, temperature, top_k, top_p, min_p. Each filter also
    keeps tokens that tie with the least likely token it keeps.

    Attributes:
        max_tokens: Maximum number of generated tokens. A sample that reaches it finishes with reason "length".
        temperature: Divisor of the logits; 0 selects the most likely token (greedy).
        top_k: Number of most likely tokens to sample from; 0 keeps every token.
        top_p: Tokens are sampled from the smallest set of most likely tokens with at least this total probability.
        min_p: Minimum probability of a token, as a fraction of the most likely token's probability.
        repetition_penalty: For tokens in the prompt or generated so far, positive logits are divided by the penalty
            and negative logits are multiplied by it (Keskar et al. 2019, arXiv:1909.05858); 1 disables it.
        n: Number of samples per prompt.
        seed: 32-bit seed. Each token's key is derived from the seed, the step, the prompt index, the sample index and
            the position.
        stop_token_ids: Token ids that end a sample with finish reason "stop" when sampled.
        stop: Strings that end a sample with finish reason "stop_string" when its text contains one of them.
        min_tokens: Minimum number of generated tokens. Before that, stop tokens are not sampled and stop strings do
            not end the sample.
        ignore_eos: Whether to continue past the end of turn and the tokenizer's EOS, which are otherwise stop tokens.
        logprobs: Number of most likely tokens to report log-probabilities for, in addition to the log-probability of
            each sampled token; None reports no log-probabilities. They are the model's, before penalty, temperature
            and filters.
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
        if 0 < self.temperature < _MIN_DIVISOR:
            raise ConfigError(f"temperature must be 0 (greedy) or at least {_MIN_DIVISOR}, got {self.temperature}")
        if not 0 <= self.top_k <= _MAX_INT32:
            raise ConfigError(f"top_k must lie in [0, {_MAX_INT32}] (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1] (1 keeps every token), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1] (0 keeps every token), got {self.min_p}")
        if not _MIN_DIVISOR <= self.repetition_penalty <= 1 / _MIN_DIVISOR:
            raise ConfigError(
                f"repetition_penalty must lie in [{_MIN_DIVISOR}, {1 / _MIN_DIVISOR}] (1 disables it), "
                f"got {self.repetition_penalty}"
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
            _require_integer(name, getattr(self, name))
        if self.logprobs is not None:
            _require_integer("logprobs", self.logprobs)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        for name in ("stop_token_ids", "stop"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ConfigError(f"{name} must be a tuple, () for none, got {getattr(self, name)!r}")
        for token in self.stop_token_ids:
            _require_integer("each of stop_token_ids", token)
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")

    def _check_ends(self) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ConfigError(f"at most {MAX_STOP_TOKENS} stop_token_ids are supported, got {len(self.stop_token_ids)}")
        if any(token < 0 for token in self.stop_token_ids):
            raise ConfigError(f"stop_token_ids must not be negative, got {list(self.stop_token_ids)}")
        if not all(isinstance(string, str) and string for string in self.stop):
            raise ConfigError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens must lie in [0, max_tokens={self.max_tokens}], got {self.min_tokens}")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Requested sizes of one engine; sizes that are None are derived from memory and workload (`sizing`).

    Attributes:
        max_seqs: Maximum number of sequences that decode together, capped at the number of requests; None: 256.
        max_seq_len: Maximum number of tokens of a sequence, prompt and generated tokens together; None: the length of
            the longest sequence, capped at the model's maximum.
        page_size: Number of tokens of one sequence per page of the cache; None: the default for the devices.
        num_pages: Number of pages in the cache; None: as many as the workload can fill and memory allows.
        prefill_chunk_tokens: Maximum number of prompt tokens per prefill; longer prompts take several. None: 2,048, or
            less if the workload has fewer tokens.
        decode_steps_per_call: Maximum number of tokens that a sequence samples per program call; the host does not see
            them earlier.
        memory_utilization: Fraction of each device's free memory that weights, cache and programs may use.
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
                _require_integer(f"engine.{field.name}", size)
                if size < 1:
                    raise ConfigError(f"engine.{field.name} must be at least 1, got {size}")
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(f"engine.memory_utilization must lie in (0, 1], got {self.memory_utilization}")


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """Resolved sizes of one engine; fields as in `EngineConfig`. They never change the generated tokens."""

    max_seqs: int
    max_seq_len: int
    page_size: int
    num_pages: int
    prefill_chunk_tokens: int = 512
    decode_steps_per_call: int = 16

    @property
    def pages_per_seq(self) -> int:
        """Number of pages of a sequence of `max_seq_len` tokens."""
        return pages_for(self.max_seq_len, self.page_size)

    @property
    def max_prefill_seqs(self) -> int:
        """Maximum number of sequences per prefill: enough for chunks of 16 tokens each."""
        return min(self.max_seqs, pages_for(self.prefill_chunk_tokens, 16))


def _require_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r}")


def pages_for(num_tokens: int, page_size: int) -> int:
    """Return the number of pages for `num_tokens` tokens of one sequence; the last page may be partially filled."""
    return -(-num_tokens // page_size)
