"""Chat templates: rendering of messages to text in a sandbox, as transformers renders them.

A rendering depends on nothing but the template, the messages, the special tokens and the configured date. This module
does not know tokens.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from simpo_pipeline.data.messages import Message
from simpo_pipeline.errors import DataError, first_line

# Jinja's own sources of random text. Transformers leaves them in; tokens must not depend on chance.
_RANDOM_FILTER, _RANDOM_GLOBAL = "random", "lipsum"


class ChatTemplate:
    """A chat template with the special tokens that it may print.

    Args:
        source: The text of the template, in Jinja.
        name: Name of the tokenizer, for messages.
        special_tokens: The tokens by role (`bos_token`, ...), which are variables of the template.
    """

    def __init__(self, source: str, name: str, special_tokens: Mapping[str, str]) -> None:
        self._source, self._name, self._special_tokens = source, name, dict(special_tokens)
        self._environment = _environment()

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
            "strftime_now": self._date_printer(date),
        }
        template = self._template
        try:
            return template.render(variables)
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

    @cached_property
    def literal_text(self) -> str:
        """All text and string constants of the template, separated by null characters.

        Raises:
            DataError: The template cannot be compiled.
        """
        tree = self._template.environment.parse(self._source)
        pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
        pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
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

    def _date_printer(self, date: str | None) -> Callable[[str], str]:
        def strftime_now(format: str) -> str:
            if date is None:
                raise DataError(
                    f"the chat template of {self._name!r} prints today's date ({format!r}), so the same conversation "
                    f"would have other tokens tomorrow; set the date of the chat config, such as 2024-07-26"
                )
            return datetime.fromisoformat(date).strftime(format)

        return strftime_now


class _GenerationBlocks(Extension):
    """The tag `{% generation %}`, which marks the text of the assistant and prints it unchanged."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    del environment.filters[_RANDOM_FILTER], environment.globals[_RANDOM_GLOBAL]
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without Jinja's escapes of HTML characters, which chat templates do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
