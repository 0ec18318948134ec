"""Tokenization of preference records, with a count of everything that did not fit.

Nothing is truncated or dropped silently: the default policy raises an error, and PairStats counts the effects of every
other policy.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from simpo_pipeline.data.chat import Note, encode_turn
from simpo_pipeline.data.config import DEFAULT_CHAT, ChatConfig, TooLong, Unusable
from simpo_pipeline.data.pairs import TokenizedPair
from simpo_pipeline.data.records import PreferenceRecord
from simpo_pipeline.data.tokenizer import Tokenizer
from simpo_pipeline.errors import ConfigError, DataError


@dataclass(frozen=True)
class PairStats:
    """Counts of kept, truncated and dropped records, and of the kept pairs' tokens.

    Token counts cover both sequences of each kept pair, without padding.
    num_records == num_pairs + num_dropped_too_long + num_dropped_unusable; num_truncated of num_pairs are truncated.
    Of num_pairs, the last five counts have text of special tokens inside a message, text that the chat template left
    out, white space around a message that it removed, characters that the tokenizer cannot represent, and an answer
    that was tokenized apart from its prompt.
    `padding_share` is the fraction of the batches' positions that would be padding with `max_length` positions per row.
    """

    num_records: int
    num_pairs: int
    num_dropped_too_long: int
    num_dropped_unusable: int
    num_truncated: int
    prompt_tokens: int
    chosen_response_tokens: int
    rejected_response_tokens: int
    longest: int
    max_length: int
    padding_share: float
    num_special_text: int
    num_omitted_text: int
    num_trimmed_text: int
    num_unencodable_text: int
    num_merged_border: int

    @property
    def num_dropped(self) -> int:
        """Number of records that were dropped, for any reason."""
        return self.num_dropped_too_long + self.num_dropped_unusable


def tokenize_pairs(
    records: Iterable[PreferenceRecord],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    too_long: TooLong = "raise",
    unusable: Unusable = "raise",
    chat_config: ChatConfig = DEFAULT_CHAT,
) -> tuple[list[TokenizedPair], PairStats]:
    """Tokenize the records in order; no sequence of the result is longer than `max_length`.

    With `too_long="truncate"`, the prompt is kept and the answers lose their ends, including their end-of-turn tokens.
    A pair is dropped if its prompt leaves no room for an answer, or if its answers become equal.

    Raises:
        ConfigError: max_length < 2.
        DataError: a pair is too long or unusable and the policy is "raise", the model would read other text than the
            messages have, the chat template cannot be used, or no pair is left.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a pair needs at least 2 tokens: prompt and answer")
    outcomes: Counter[str] = Counter()
    notes: Counter[Note] = Counter()
    pairs: list[TokenizedPair] = []
    for record in records:
        complaint = _complaint(record)
        pair, noted = (None, frozenset()) if complaint else _tokenize_pair(record, tokenizer, chat_config)
        outcome, pair = _apply_policies(record, pair, complaint, max_length, too_long, unusable)
        outcomes[outcome] += 1
        if pair is not None:
            pairs.append(pair)
            notes.update(noted)
    if not pairs:
        raise DataError(
            f"none of {outcomes.total()} pairs is left: {outcomes['too long']} longer than max_length {max_length}, "
            f"{outcomes['unusable']} without a preference; raise max_length or check the data"
        )
    return pairs, _stats(pairs, outcomes, notes, max_length)


def _apply_policies(
    record: PreferenceRecord,
    pair: TokenizedPair | None,
    complaint: str | None,
    max_length: int,
    too_long: TooLong,
    unusable: Unusable,
) -> tuple[str, TokenizedPair | None]:
    """Return the outcome of a record ('kept', 'truncated', 'too long' or 'unusable'), and its pair if it is kept."""
    if pair is not None and np.array_equal(pair.chosen_tokens, pair.rejected_tokens):
        complaint = "the chat template renders 'chosen' and 'rejected' to equal tokens, expected two different answers"
    if complaint and unusable == "raise":
        raise DataError(f"{record.where}: {complaint}; correct the row, or set unusable to 'drop'")
    if complaint or pair is None:
        return "unusable", None
    if pair.longest <= max_length:
        return "kept", pair
    if too_long == "raise":
        raise DataError(
            f"{record.where}: the pair {pair.prompt_id!r} has {pair.longest} tokens, more than max_length "
            f"{max_length}; raise max_length, or set too_long to 'truncate' or 'drop'"
        )
    truncated = _truncate(pair, max_length) if too_long == "truncate" else None
    return ("truncated", truncated) if truncated else ("too long", None)


def _complaint(record: PreferenceRecord) -> str | None:
    for side, messages in (("chosen", record.chosen), ("rejected", record.rejected)):
        if not messages[-1].content.strip():
            return f"field '{side}[{len(messages) - 1}].content' is an empty answer, expected text"
    if record.chosen[-1].content == record.rejected[-1].content:
        return "fields 'chosen' and 'rejected' have the same answer, expected two different ones"
    return None


def _tokenize_pair(
    record: PreferenceRecord, tokenizer: Tokenizer, chat_config: ChatConfig
) -> tuple[TokenizedPair, frozenset[Note]]:
    try:
        chosen, rejected = (
            encode_turn(tokenizer, messages, chat_config) for messages in (record.chosen, record.rejected)
        )
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from error
    pair = TokenizedPair(
        prompt_id=record.prompt_id,
        chosen_tokens=np.array(chosen.prompt + chosen.answer, dtype=np.int32),
        rejected_tokens=np.array(rejected.prompt + rejected.answer, dtype=np.int32),
        chosen_response_start=len(chosen.prompt),
        rejected_response_start=len(rejected.prompt),
    )
    return pair, chosen.notes | rejected.notes


def _truncate(pair: TokenizedPair, max_length: int) -> TokenizedPair | None:
    no_room = max(pair.chosen_response_start, pair.rejected_response_start) >= max_length
    chosen, rejected = pair.chosen_tokens[:max_length], pair.rejected_tokens[:max_length]
    if no_room or np.array_equal(chosen, rejected):
        return None
    return replace(pair, chosen_tokens=chosen, rejected_tokens=rejected)


def _stats(pairs: Sequence[TokenizedPair], outcomes: Counter[str], notes: Counter[Note], max_length: int) -> PairStats:
    return PairStats(
        num_records=outcomes.total(),
        num_pairs=len(pairs),
        num_dropped_too_long=outcomes["too long"],
        num_dropped_unusable=outcomes["unusable"],
        num_truncated=outcomes["truncated"],
        prompt_tokens=sum(pair.chosen_response_start + pair.rejected_response_start for pair in pairs),
        chosen_response_tokens=sum(len(pair.chosen_tokens) - pair.chosen_response_start for pair in pairs),
        rejected_response_tokens=sum(len(pair.rejected_tokens) - pair.rejected_response_start for pair in pairs),
        longest=max(pair.longest for pair in pairs),
        max_length=max_length,
        padding_share=1.0 - sum(pair.num_tokens for pair in pairs) / (2 * len(pairs) * max_length),
        num_special_text=notes["special_text"],
        num_omitted_text=notes["omitted_text"],
        num_trimmed_text=notes["trimmed_text"],
        num_unencodable_text=notes["unencodable_text"],
        num_merged_border=notes["merged_border"],
    )
