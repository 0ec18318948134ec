"""A tokenizer: the content of tokenizer.json, with the roles of its special tokens and the chat template of its folder.

Token ids are those that the `tokenizers` library gives for tokenizer.json. This module does not know folders or chats.
"""

import json
import re
import unicodedata
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from simpo_pipeline.data.template import ChatTemplate
from simpo_pipeline.errors import DataError, first_line

# Shown around the first character that a tokenizer loses.
_EXCERPT_CHARACTERS = 20
# A character that is neither of a word nor white space, and text that is written like a control token.
_SIGN = re.compile(r"[^\w\s]")
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# First character of a stand-in for a control token. Unicode reserves it for private use, so texts do not contain it.
_STAND_IN = "\U000f0000"


@contextmanager
def backend_errors(complaint: str, remedy: str) -> Generator[None]:
    """Turn errors of the `tokenizers` library into ours. It raises bare exceptions, and panics (a BaseException).

    Raises:
        DataError: The library failed. The message is the complaint, the library's reason and the remedy.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"{complaint} ({first_line(error)}); {remedy}") from error


def encode_with(backend: Backend, text: str, name: str) -> list[int]:
    """Return the tokens of a text, without those that the tokenizer `name` puts around it.

    Raises:
        DataError: The text is not valid Unicode, or has a character that the tokenizer cannot handle.
    """
    remedy = "remove what it has no token for, and halves of surrogate pairs"
    with backend_errors(f"the tokenizer {name!r} cannot encode {text!r:.80}", remedy):
        return backend.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of one folder.

    Attributes:
        name: Path or hub id of the folder, for messages.
        backend: The tokenizer of tokenizer.json. It neither truncates nor pads.
        special_tokens: Texts of the special tokens by role (`bos_token`, `eos_token`, ...).
        chat_template: The chat template in Jinja, or None.
        adds_bos: Whether a text without chat template begins with the BOS token; None: as tokenizer.json says.
        model_end_ids: Ids of the tokens that end a text according to config.json and generation_config.json.
    """

    name: str
    backend: Backend
    special_tokens: Mapping[str, str]
    chat_template: str | None
    adds_bos: bool | None = None
    model_end_ids: tuple[int, ...] = ()

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, or None."""
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, or None."""
        return self._role_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, or None."""
        return self._role_id("pad_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text that is to be continued.

        With `add_special_tokens`, they begin with those that the tokenizer puts before a text (BOS). Tokens that it
        puts after a text (EOS) never follow, because nothing can continue after them.

        Raises:
            DataError: The text is not valid Unicode, or has a character that the tokenizer cannot handle.
        """
        tokens = encode_with(self.backend, text, self.name)
        return [*self.first_tokens, *tokens] if add_special_tokens else tokens

    def encode_with_plain(self, text: str, plain: Sequence[tuple[int, int]]) -> list[int]:
        """Return the tokens of a text, in which the control tokens at the ranges `plain` are ordinary text.

        Raises:
            DataError: The tokenizer reads one of them as a control token in any case.
        """
        if not plain:
            return self.encode(text, add_special_tokens=False)
        stand_ins, backend, original_ids = self._without_control_tokens
        if _STAND_IN in text:
            raise DataError(
                f"the text has the private character {_STAND_IN!r}, which stands for control tokens here; remove it, "
                f"or set special_text to 'parse'"
            )
        pieces, num_controls, last = "", 0, 0
        for start, end in [*plain, (len(text), len(text))]:
            piece, count = self.control_pattern.subn(lambda match: stand_ins.get(match[0], match[0]), text[last:start])
            pieces, num_controls, last = pieces + piece + text[start:end], num_controls + count, end
        tokens = [original_ids.get(token, token) for token in encode_with(backend, pieces, self.name)]
        if sum(token in self.control_ids for token in tokens) > num_controls:
            raise DataError(
                f"the tokenizer {self.name!r} reads {text[slice(*plain[0])]!r} as a control token even in ordinary "
                f"text; remove it from the message, or set special_text to 'parse'"
            )
        return tokens

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        return self.backend.decode(tokens, skip_special_tokens=skip_special_tokens)

    def first_lost_text(self, text: str, tokens: Sequence[int]) -> str | None:
        """Return the text around the first character that `tokens`, those of `text`, do not represent.

        Blanks that a tokenizer inserts, other Unicode forms of the same character, and white space that a special token
        absorbs are no loss.
        """
        decoded = self.decode(tokens)
        if decoded == text:
            return None
        wanted, found = self._comparable(text), self._comparable(decoded)
        at = 0
        for index, character in enumerate(wanted):
            while found[at : at + 1] == " " != character:
                at += 1
            if found[at : at + 1] != character:
                return wanted[max(0, index - _EXCERPT_CHARACTERS) : index + _EXCERPT_CHARACTERS]
            at += 1
        return None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: There is none.
        """
        if not self.chat_template:
            raise DataError(
                f"{self.name}: the tokenizer has no chat template, so messages cannot be tokenized; use the tokenizer "
                f"of the model's instruction-tuned variant, or add a chat_template.jinja to the folder"
            )
        return ChatTemplate(self.chat_template, self.name, self.special_tokens)

    @cached_property
    def first_tokens(self) -> list[int]:
        """The tokens that the tokenizer puts before each text, in general BOS or none."""
        if self.adds_bos is None:
            texts = ("a", "0", ".", *(token.content for token in self.added_tokens.values()))
            text = next((text for text in texts if self.encode(text, add_special_tokens=False)), "")
            with backend_errors(f"the tokenizer {self.name!r} has a post_processor that fails", "correct it"):
                encoding = self.backend.encode(text)
            return encoding.ids[: encoding.special_tokens_mask.index(0)] if 0 in encoding.special_tokens_mask else []
        bos = self.bos_token_id
        return [bos] if self.adds_bos and bos is not None else []

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """The tokens that are matched in a text before anything else, special or not."""
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def control_ids(self) -> dict[int, str]:
        """The tokens that structure a chat: all special tokens, and those that the template writes.

        The latter are added tokens, or pieces of the vocabulary that are read as one token (`<|im_end|>` in a unigram
        model). Words and white space are no such tokens.

        Raises:
            DataError: The chat template cannot be compiled.
        """
        written = self.template.written_text if self.chat_template else ""
        roles = set(self.special_tokens.values())
        controls = {
            index: token.content
            for index, token in self.added_tokens.items()
            if token.special or token.content in roles or (token.content in written and _SIGN.search(token.content))
        }
        for text in set(_TAG.findall(written)):
            index = self.backend.token_to_id(text)
            if index is not None and index in self.encode(text, add_special_tokens=False):
                controls[index] = text
        return controls

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Pattern of the text of a control token."""
        longest_first = sorted(self.control_ids.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def has_control_text(self, text: str) -> bool:
        """Return whether a control token would be read in a text that should have none."""
        if self.control_pattern.search(text):
            return True
        # A normalizer can turn other text (full-width brackets) into that of a token.
        added = self.added_tokens
        is_normalized = any(index not in added or added[index].normalized for index in self.control_ids)
        if self.backend.normalizer is None or not is_normalized:
            return False
        return not self.control_ids.keys().isdisjoint(self.encode(text, add_special_tokens=False))

    @cached_property
    def _without_control_tokens(self) -> tuple[dict[str, str], Backend, dict[int, int]]:
        """Stand-ins for the control tokens, a tokenizer that knows only these, and original ids by ids of that."""
        content: dict[str, Any] = json.loads(self.backend.to_str())
        content["post_processor"] = None
        stand_ins: dict[str, str] = {}
        for token in content["added_tokens"]:
            text = token["content"]
            if text in self.control_ids.values():
                stand_ins[text] = token["content"] = _STAND_IN + chr(ord(_STAND_IN) + 1 + len(stand_ins))
        backend = Backend.from_str(json.dumps(content))
        original = {stand_ins.get(token.content, token.content): index for index, token in self.added_tokens.items()}
        ids = {index: original[token.content] for index, token in backend.get_added_tokens_decoder().items()}
        return stand_ins, backend, ids

    def _comparable(self, text: str) -> str:
        return unicodedata.normalize("NFC", self._absorbed_space.sub(lambda match: match[0].strip(), text)).lstrip(" ")

    @cached_property
    def _absorbed_space(self) -> re.Pattern[str]:
        absorbing = [
            "".join((r"\s*" * token.lstrip, re.escape(token.content), r"\s*" * token.rstrip))
            for token in self.added_tokens.values()
            if (token.lstrip or token.rstrip) and not token.content.isspace()
        ]
        return re.compile("|".join(absorbing) or "(?!)")

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)
