"""Sampling parameters and engine sizes.

This module does not import JAX, so planning code can use these classes without the cost of that import. Engine sizes
never change the generated tokens.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.executor.step import added_later

# Width of the array of stop token ids that each sampled token is compared with on the device.
MAX_STOP_TOKENS = 8
# Maximum number of top log-probabilities that a program reports per token; vLLM's default.
MAX_LOGPROBS = 20
# Width of the arrays of biased tokens in the programs that add biases.
MAX_LOGIT_BIAS = 512
# Bounds of the penalties per generated token, as in vLLM, and of a bias. A larger bias would leave no other digit of
# the logit.
_MAX_PENALTY, _MAX_BIAS = 2.0, 1e4
# The largest int32, for values sent to the device, and the smallest divisor of logits whose quotients fit float32.
_MAX_INT32, _MIN_DIVISOR = 2**31 - 1, 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters and stop conditions of one prompt's samples; names as in vLLM.

    Biases and penalties apply in the order of vLLM: logit_bias, repetition, frequency and presence penalty. Filters
    follow in the order of Hugging Face: temperature, top_k, top_p, min_p. Each filter also keeps tokens that tie with
    the least likely token it keeps. docs/generation.md compares each parameter with vLLM's.

    Attributes:
        max_tokens: Maximum number of generated tokens. A sample that reaches it finishes with reason "length".
        temperature: Divisor of the logits; 0 selects the most likely token (greedy).
        top_k: Number of most likely tokens to sample from; 0, or -1 as in vLLM, keeps every token.
        top_p: Tokens are sampled from the smallest set of most likely tokens with at least this total probability.
        min_p: Minimum probability of a token, as a fraction of the most likely token's probability.
        repetition_penalty: For tokens in the prompt or generated so far, positive logits are divided by the penalty
            and negative logits are multiplied by it (Keskar et al. 2019, arXiv:1909.05858); 1 disables it.
        n: Number of samples per prompt.
        seed: 32-bit seed. Each token's key is derived from the seed, the step, the prompt index, the sample index and
            the position. None: `LLM` draws a seed and reports it with the outputs; steps refuse None.
        stop_token_ids: Token ids that end a sample with finish reason "stop" when sampled.
        stop: Strings that end a sample with finish reason "stop_string" when its text contains one of them; a single
            string is one stop string.
        min_tokens: Minimum number of generated tokens. Before that, stop tokens are not sampled and stop strings do
            not end the sample.
        ignore_eos: Whether to continue past the end of turn and the tokenizer's EOS, which are otherwise stop tokens.
        logprobs: Number of most likely tokens to report log-probabilities for, in addition to the log-probability of
            each sampled token; None reports no log-probabilities. They are the model's, before biases, penalties,
            temperature and filters.
        presence_penalty: Subtracted from the logit of each token that the sample already contains; prompts do not
            count. 0 disables it.
        frequency_penalty: Subtracted as often as the sample contains the token; prompts do not count. 0 disables it.
        logit_bias: Numbers to add to the logits of tokens, by token id; -inf bans a token. Kept as pairs, sorted by
            token id.
        bad_words: Texts that must not be generated. As in vLLM, a word is banned as it is tokenized alone, and also
            after a blank if that is as many tokens. Each must be a single token of the vocabulary.
        prompt_logprobs: Log-probabilities of prompt tokens are not supported; must be None.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    stop: str | Sequence[str] | None = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = added_later(default=0.0)
    frequency_penalty: float = added_later(default=0.0)
    logit_bias: Mapping[int, int | float] | Sequence[tuple[int, int | float]] | None = added_later(default=())
    bad_words: Sequence[str] | None = added_later(default=())
    prompt_logprobs: int | None = added_later(default=None)

    def __post_init__(self) -> None:
        self._check_types()
        self._normalize()
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature must be a finite number of at least 0 (0 is greedy), got {self.temperature}"
            )
        if 0 < self.temperature < _MIN_DIVISOR:
            raise ConfigError(f"temperature must be 0 (greedy) or at least {_MIN_DIVISOR}, got {self.temperature}")
        if not 0 <= self.top_k <= _MAX_INT32:
            raise ConfigError(f"top_k must lie in [0, {_MAX_INT32}] (0 or -1 keeps every token), got {self.top_k}")
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
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in [0, 2**32) or be None (a seed is drawn), got {self.seed}")
        self._check_ends()
        self._check_adjustments()
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ConfigError(f"logprobs must be None or lie in [0, {MAX_LOGPROBS}], got {self.logprobs}")

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The token ids of `stop_token_ids`."""
        return tuple(self.stop_token_ids or ())

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings of `stop`."""
        return _texts(self.stop)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """The pairs of token id and bias of `logit_bias`, sorted by token id."""
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias or ()
        return tuple(sorted((token, float(bias)) for token, bias in pairs))

    @property
    def adjusts_logits(self) -> bool:
        """Whether the sample needs the programs that count generated tokens and add biases."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias or self.bad_words)

    def _normalize(self) -> None:
        """Give each of several ways to write a value the same form, so that they are equal and have one identity."""
        forms = {
            "stop": _texts(self.stop),
            "bad_words": _texts(self.bad_words),
            "stop_token_ids": self.stop_tokens,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "logit_bias": self.biases,
        }
        for name, value in forms.items():
            object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        for name in ("max_tokens", "top_k", "n", "min_tokens"):
            _require_integer(name, getattr(self, name))
        for name in ("seed", "logprobs"):
            if getattr(self, name) is not None:
                _require_integer(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            _require_number(name, getattr(self, name))
        if not isinstance(self.stop_token_ids, tuple | list | None):
            raise ConfigError(f"stop_token_ids must be a tuple, () for none, got {self.stop_token_ids!r}")
        for token in self.stop_token_ids or ():
            _require_integer("each of stop_token_ids", token)
        for name in ("stop", "bad_words"):
            _require_texts(name, getattr(self, name))
        self._check_pairs()
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")

    def _check_ends(self) -> None:
        if len(self.stop_tokens) > MAX_STOP_TOKENS:
            raise ConfigError(f"at most {MAX_STOP_TOKENS} stop_token_ids are supported, got {len(self.stop_tokens)}")
        if any(token < 0 for token in self.stop_tokens):
            raise ConfigError(f"stop_token_ids must not be negative, got {list(self.stop_tokens)}")
        if not all(self.stop_strings):
            raise ConfigError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens must lie in [0, max_tokens={self.max_tokens}], got {self.min_tokens}")

    def _check_adjustments(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -_MAX_PENALTY <= getattr(self, name) <= _MAX_PENALTY:
                raise ConfigError(
                    f"{name} must lie in [-{_MAX_PENALTY}, {_MAX_PENALTY}] (0 disables it), got {getattr(self, name)}"
                )
        if not all(word.strip() for word in _texts(self.bad_words)):
            raise ConfigError(f"bad_words must be a tuple of texts that are not blank, got {self.bad_words!r}")
        if self.prompt_logprobs is not None:
            raise ConfigError(
                f"prompt_logprobs is {self.prompt_logprobs!r}, but log-probabilities of prompt tokens are not "
                "supported; leave it None. Those of generated tokens are: set logprobs"
            )
        for token, bias in self.biases:
            if token < 0:
                raise ConfigError(f"logit_bias has token id {token}; token ids are not negative")
            if not -_MAX_BIAS <= bias <= _MAX_BIAS and bias != -math.inf:
                raise ConfigError(
                    f"logit_bias[{token}] must lie in [-{_MAX_BIAS:g}, {_MAX_BIAS:g}] or be -inf (a ban), got {bias}"
                )
        twice = [token for (token, _), (after, _) in itertools.pairwise(self.biases) if token == after]
        if twice:
            raise ConfigError(f"logit_bias has token id {twice[0]} twice; give each token one bias")
        if len(self.biases) > MAX_LOGIT_BIAS:
            raise ConfigError(f"at most {MAX_LOGIT_BIAS} tokens may have a logit_bias, got {len(self.biases)}")

    def _check_pairs(self) -> None:
        pairs = () if self.logit_bias is None else self.logit_bias
        if not isinstance(pairs, Mapping | tuple | list):
            raise ConfigError(f"logit_bias must be a mapping from token ids to numbers, got {pairs!r:.80}")
        for pair in pairs.items() if isinstance(pairs, Mapping) else pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"logit_bias must be a mapping, or pairs of token id and number, got {pair!r:.80}")
            _require_integer("each token id of logit_bias", pair[0])
            _require_number(f"logit_bias[{pair[0]}]", pair[1])


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
        _require_number("engine.memory_utilization", self.memory_utilization)
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


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")


def _require_texts(name: str, value: object) -> None:
    for text in value if isinstance(value, tuple | list) else [] if value is None else [value]:
        if not isinstance(text, str):
            raise ConfigError(f"{name} must be a text or a tuple of texts, () for none, got {value!r}")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{name} is {value!r}, which is not valid Unicode; remove the halves of surrogate pairs")


def _texts(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def pages_for(num_tokens: int, page_size: int) -> int:
    """Return the number of pages for `num_tokens` tokens of one sequence; the last page may be partially filled."""
    return -(-num_tokens // page_size)
