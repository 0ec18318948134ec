"""Chat templates: rendering of messages to text in a sandbox, as transformers renders them.

A rendering depends on nothing but the template, the messages, the special tokens and the configured date. This module
does not know tokens.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes

from simpo_pipeline.data.messages import Message
from simpo_pipeline.data.template_sandbox import TemplateSandbox
from simpo_pipeline.errors import DataError, first_line

# How Python prints a function or an object: with its address in memory, which is another one in every process.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+>")
# Content that no tokenizer has a token for: a character for private use.
_NO_TEXT = "\uf8ff"
_SOME_DATE = "2000-01-01"


class ChatTemplate:
    """A chat template with the special tokens that it may print.

    Args:
        source: The text of the template, in Jinja.
        name: Name of the tokenizer, for messages.
        special_tokens: The tokens by role (`bos_token`, ...), which are variables of the template.
    """

    def __init__(self, source: str, name: str, special_tokens: Mapping[str, str]) -> None:
        self._source, self._name, self._special_tokens = source, name, dict(special_tokens)
        self._environment = TemplateSandbox()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, date: str | None) -> str:
        """Return the text of a conversation; `date` replaces today's date.

        Raises:
            DataError: The template rejects the conversation, has an error, or prints the date and there is none.
        """
        variables = {
            **self._special_tokens,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": partial(self._format_date, date),
        }
        template = self._template
        self._environment.start()
        try:
            text = template.render(variables)
        except DataError:
            raise
        # A template is a program from outside, so it can fail with any error.
        except Exception as error:
            roles = ", ".join(message.role for message in messages)
            kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            raise DataError(
                f"the chat template of {self._name!r} rejects a conversation of {roles}: {kind}{first_line(error)}; "
                f"change the conversation to one that the template accepts, or correct the template"
            ) from error
        written = {address for message in messages for address in _ADDRESS.findall(message.content)}
        if any(address not in written for address in _ADDRESS.findall(text)):
            raise DataError(
                f"the chat template of {self._name!r} prints a function or an object of Python, whose text differs "
                f"from process to process; correct the template (a method needs parentheses)"
            )
        return text

    @cached_property
    def written_text(self) -> str:
        """The text that the template writes around messages: its constants, and two conversations that it renders.

        The latter contain what it puts together, such as `<|user|>` from the name of the role.

        Raises:
            DataError: The template cannot be compiled.
        """
        tree = self._template.environment.parse(self._source)
        pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
        pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            messages = [Message(role, _NO_TEXT) for role in roles]
            with contextlib.suppress(DataError):
                pieces.append(self.render(messages, add_generation_prompt=True, date=_SOME_DATE))
        return "\0".join(pieces)

    @cached_property
    def _template(self) -> Any:
        try:
            return self._environment.from_string(self._source)
        except Exception as error:
            where = f" at line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise DataError(
                f"the chat template of {self._name!r} cannot be compiled{where}: {first_line(error)}; correct the "
                f"template in chat_template.jinja or tokenizer_config.json"
            ) from error

    def _format_date(self, date: str | None, format: str) -> str:
        if date is None:
            raise DataError(
                f"the chat template of {self._name!r} prints today's date ({format!r}), so the same conversation "
                f"would have other tokens tomorrow; set the date of the chat config, such as 2024-07-26"
            )
        return datetime.fromisoformat(date).strftime(format)
