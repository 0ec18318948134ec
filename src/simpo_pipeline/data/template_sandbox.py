"""The Jinja environment of chat templates: a sandbox without randomness, in which every rendering ends.

A template is a program from outside. It reaches no file, no attribute of Python and no source of chance, and it is
stopped when it takes too many steps or makes too much text. The limits count work, not time, so that every process
stops at the same place. A conversation of a million tokens stays below them.
"""

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 1_000_000
"""Limit of one rendering: iterations of loops, calls, and elements of the lists and mappings that it makes."""
MAX_CHARACTERS = 100_000_000
"""Limit of one rendering: characters of the texts that it makes and prints."""
_MAX_EXPONENT = 1000
# Jinja's own sources of random text. Transformers leaves them in; tokens must not depend on chance.
_RANDOM_FILTER, _RANDOM_GLOBAL = "random", "lipsum"


class _CountingCode(CodeGenerator):
    """Compiles loops that count their iterations, and `~` and literals whose values are counted."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._visit_counted(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_counted(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_counted(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._visit_counted(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)  # the targets of an assignment

    def _visit_counted(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.counted(")
        visit(node, frame)
        self.write(")")


class _GenerationBlocks(Extension):
    """The tag `{% generation %}`, which marks the text of the assistant and prints it unchanged."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of one chat template. Call `start` before each rendering."""

    code_generator_class = _CountingCode
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, loopcontrols],
            finalize=self.counted,
        )
        self.start()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        del self.filters[_RANDOM_FILTER], self.globals[_RANDOM_GLOBAL]
        for name, function in self.filters.items():
            # Also copies the mark of a filter that gets the environment or the context.
            limited = functools.update_wrapper(functools.partial(self._call_filter, function), function)
            self.filters[name] = limited

    def start(self) -> None:
        """Begin a rendering: nothing has been counted."""
        self._num_steps = self._num_characters = 0

    def count_step(self) -> None:
        """Count an iteration or a call."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise TemplateError(f"it takes more than {MAX_STEPS:,} steps, so it may never end")

    def counted(self, value: Any) -> Any:
        """Return a value, after counting its characters or all elements inside it.

        A list that holds the same list twice is as large as its text, so the elements of both are counted.
        """
        if isinstance(value, str):
            self._num_characters += len(value)
            _check_size(self._num_characters)
            return value
        pending = [value]
        while pending:
            inner = pending.pop()
            if isinstance(inner, Namespace):
                inner = object.__getattribute__(inner, "_Namespace__attrs")
            if isinstance(inner, list | tuple | dict):
                for element in inner.values() if isinstance(inner, dict) else inner:
                    self.count_step()
                    pending.append(element)
        return value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method of a value."""
        self.count_step()
        _check_integers((*args, *kwargs.values()))
        return self.counted(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply one of the operators that can make large values."""
        if operator == "*":
            _check_size(_size(left) * _size(right))
        if operator == "**" and (_size(right) > _MAX_EXPONENT or _size(left) > MAX_CHARACTERS):
            raise TemplateError(f"it computes a power above {MAX_CHARACTERS:,} ** {_MAX_EXPONENT}")
        return self.counted(super().call_binop(context, operator, left, right))

    def _call_filter(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        for value in args:
            self.counted(value)  # a filter such as `sort` or `map` reads all of it
        _check_integers((*args, *kwargs.values()))
        return self.counted(function(*args, **kwargs))


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | list | tuple) else 1


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateError(f"it makes more than {MAX_CHARACTERS:,} characters of text")


def _check_integers(values: Iterable[Any]) -> None:
    """Check the numbers that a function gets: such a number may be the width of a text."""
    for value in values:
        if isinstance(value, int):
            _check_size(abs(value))


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
