"""Conversion of chat messages to token ids with a Hugging Face tokenizer and its chat template.

Also finds the tokens that end a turn.

Invariant: for every conversation that ends in an answer, the prompt's tokens are exactly those generation starts from:
`encode_turn(t, messages).prompt == encode_chat(t, messages[:-1], add_generation_prompt=True)`.

This module does not know preference pairs, models or batches.
"""

import logging
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jinja2 import TemplateError

from simpo_pipeline.data.records import Message
from simpo_pipeline.errors import DataError, first_line
from simpo_pipeline.storage.files import list_files, read_bytes
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme

# The files of a tokenizer. A model folder also contains gigabytes of weights, which must not be downloaded for it.
_TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
)


@runtime_checkable
class Tokenizer(Protocol):
    """The part of the Hugging Face tokenizer interface that this project uses."""

    chat_template: Any
    name_or_path: str

    @property
    def eos_token_id(self) -> Any: ...

    @property
    def pad_token_id(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, **options: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> Any: ...


@dataclass(frozen=True)
class EncodedTurn:
    """Tokens of a conversation, split where the last answer begins; the answer ends with its end-of-turn token."""

    prompt: list[int]
    answer: list[int]


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer at a local folder, an fsspec folder (`gs://...`) or a hub id (`owner/name`, `owner/name@rev`).

    Raises:
        DataError: there is no tokenizer, or it has no chat template.
        StorageError: the folder cannot be read.
    """
    with _without_torch_notice():
        from transformers import AutoTokenizer  # imported here because it takes seconds

    with _local_tokenizer(path) as (name, revision):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path}: no tokenizer could be loaded ({first_line(error)}); expected a folder with "
                f"tokenizer.json and tokenizer_config.json, or the id of a model on the hub"
            ) from error
    if not tokenizer.chat_template:
        raise DataError(
            f"{path}: the tokenizer has no chat template, so messages cannot be tokenized; use the tokenizer of the "
            f"model's instruction-tuned variant, or add a chat_template.jinja to the folder"
        )
    return tokenizer


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """Return the tokens of the rendered conversation.

    With `add_generation_prompt`, the opening of an assistant turn follows the messages.

    Raises:
        DataError: the chat template rejects the messages.
    """
    # return_dict is False because transformers 5 returns an encoding of several fields otherwise.
    return list(_apply(tokenizer, messages, add_generation_prompt, tokenize=True, return_dict=False))


def encode_turn(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedTurn:
    """Return the tokens of a conversation, split before its last turn.

    White space that the template writes after the end-of-turn token is excluded: generation stops before it.
    If the tokenizer merges text across the boundary (an answer that begins with a line break), the answer is tokenized
    separately, because generation starts from the prompt's own tokens.

    Raises:
        DataError: the template rejects the messages, or renders the prompt differently when the answer follows.
    """
    prompt = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
    full = encode_chat(tokenizer, messages, add_generation_prompt=False)
    answer = full[len(prompt) :] if full[: len(prompt)] == prompt else _encode_answer_alone(tokenizer, messages)
    return EncodedTurn(prompt=prompt, answer=_cut_after_turn(tokenizer, answer))


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of the tokens that end a generated turn, in ascending order.

    These are the end-of-turn token of the template and the end-of-sequence token of the tokenizer. They may differ:
    Llama 3 ends a turn with a different token than a text.
    """
    probe = (Message("user", "question"), Message("assistant", "answer"))
    last = encode_turn(tokenizer, probe).answer[-1]
    ends = {last} & _special_ids(tokenizer)
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return tuple(sorted(ends))


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that pads rows at their end. Any token works, because masks exclude padding."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _encode_answer_alone(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    prompt_text = _apply(tokenizer, messages[:-1], True, tokenize=False)
    full_text = _apply(tokenizer, messages, False, tokenize=False)
    if not full_text.startswith(prompt_text):
        same = next(i for i, character in enumerate(prompt_text) if full_text[i : i + 1] != character)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} renders the prompt differently when the answer follows: "
            f"{prompt_text[same : same + 40]!r} becomes {full_text[same : same + 40]!r} at character {same}; training "
            f"needs a template whose prompt, with add_generation_prompt, is a prefix of the whole conversation"
        )
    return list(tokenizer.encode(full_text[len(prompt_text) :], add_special_tokens=False))


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, **options: Any) -> Any:
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **options)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} rejects a conversation of {roles}: {error}"
        ) from error


def _cut_after_turn(tokenizer: Tokenizer, answer: list[int]) -> list[int]:
    special = _special_ids(tokenizer)
    end = len(answer)
    while end and answer[end - 1] not in special and not tokenizer.decode([answer[end - 1]]).strip():
        end -= 1
    return answer[:end] if end and answer[end - 1] in special else answer


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


@contextmanager
def _local_tokenizer(path: str) -> Generator[tuple[str, str | None]]:
    """Yield a name that transformers can load, and a revision or None.

    A local folder is used as is. A remote folder is copied to a temporary one. A hub id is split from its revision.
    """
    if not is_local(path):
        with tempfile.TemporaryDirectory(prefix="simpo_pipeline_") as folder:
            for entry in list_files(path):
                if entry.relative_path in _TOKENIZER_FILES:
                    Path(folder, entry.relative_path).write_bytes(read_bytes(join(path, entry.relative_path)))
            yield folder, None
        return
    local_path = strip_file_scheme(path)
    if os.path.isdir(local_path):
        yield local_path, None
        return
    if local_path != path or path.startswith(("/", ".")):
        raise DataError(f"{path}: there is no such folder; expected the folder of a tokenizer or a model id on the hub")
    name, _, revision = path.partition("@")
    yield name, revision or None


@contextmanager
def _without_torch_notice() -> Generator[None]:
    """Suppress the notice of transformers' first import that PyTorch is absent; tokenizers do not need it."""

    def is_other(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
