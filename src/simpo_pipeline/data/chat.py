"""Chat messages to token ids through a Hugging Face tokenizer and its chat template, and back to the turn's end.

Law: for every conversation that ends in an answer, the tokens of the prompt are exactly those generation starts from:
`encode_turn(t, messages).prompt == encode_chat(t, messages[:-1], add_generation_prompt=True)`.

Knows nothing of preference pairs, models or batches.
"""

import logging
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from simpo_pipeline.data.records import Message
from simpo_pipeline.errors import DataError, first_line
from simpo_pipeline.storage.files import list_files, read_bytes
from simpo_pipeline.storage.paths import is_local, join, strip_file_scheme

# What a tokenizer may consist of; a model folder also holds gigabytes of weights, which must not be downloaded for it.
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
    """What this project asks of a Hugging Face tokenizer."""

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
    """A conversation split where the last answer begins; the answer ends with its end-of-turn token."""

    prompt: list[int]
    answer: list[int]


def load_tokenizer(path: str) -> Tokenizer:
    """Load the tokenizer at a local folder, an fsspec folder (`gs://...`) or a hub id (`owner/name`, `owner/name@rev`).

    Raises:
        DataError: there is no tokenizer, or it has no chat template.
        StorageError: the folder cannot be read.
    """
    with _without_torch_notice():
        from transformers import AutoTokenizer  # here, because it takes seconds to import

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
            f"{path}: the tokenizer has no chat template, so messages cannot become tokens; use the tokenizer of the "
            f"model's instruction-tuned sibling, or add a chat_template.jinja to the folder"
        )
    return tokenizer


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
    """Return the tokens of the rendered conversation; with add_generation_prompt an assistant's turn is opened.

    Raises:
        DataError: the chat template refuses the messages.
    """
    # return_dict is False because transformers 5 else answers with an encoding of several fields.
    return list(_apply(tokenizer, messages, add_generation_prompt, tokenize=True, return_dict=False))


def encode_turn(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedTurn:
    """Return the tokens of a conversation, split before its last turn.

    White space that the template writes after the end-of-turn token is left out: generation stops before it.
    Where the tokenizer merges text across the border (an answer that begins with a line break), the answer is
    tokenised by itself, since generation starts from the prompt's own tokens.

    Raises:
        DataError: the template refuses the messages or renders the prompt differently once the answer follows.
    """
    prompt = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
    full = encode_chat(tokenizer, messages, add_generation_prompt=False)
    answer = full[len(prompt) :] if full[: len(prompt)] == prompt else _encode_answer_alone(tokenizer, messages)
    return EncodedTurn(prompt=prompt, answer=_cut_after_turn(tokenizer, answer))


def stop_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens at which a generated turn is over, ascending: the template's end of turn and end of sequence.

    They may differ: Llama 3 ends turns with another token than texts.
    """
    probe = (Message("user", "question"), Message("assistant", "answer"))
    last = encode_turn(tokenizer, probe).answer[-1]
    ends = {last} & _special_ids(tokenizer)
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return tuple(sorted(ends))


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Return the token that fills rows behind their end; any will do, since masks exclude it."""
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
            f"the chat template of {tokenizer.name_or_path!r} renders the prompt differently once the answer follows: "
            f"{prompt_text[same : same + 40]!r} becomes {full_text[same : same + 40]!r} at character {same}; training "
            f"needs a template whose prompt, with add_generation_prompt, is the beginning of the whole conversation"
        )
    return list(tokenizer.encode(full_text[len(prompt_text) :], add_special_tokens=False))


def _apply(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, **options: Any) -> Any:
    from jinja2 import TemplateError  # here, as transformers: planning needs neither

    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **options)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template of {tokenizer.name_or_path!r} refuses turns of {roles}: {error}") from error


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
    """Give a name transformers can load: a local folder as it is, a remote one copied, a hub id with its revision."""
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
        raise DataError(f"{path}: there is no such folder; expected a tokenizer's folder or a model id on the hub")
    name, _, revision = path.partition("@")
    yield name, revision or None


@contextmanager
def _without_torch_notice() -> Generator[None]:
    """Keep quiet that torch is absent, which transformers logs at its first import: tokenizers do without."""

    def is_other(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
