"""What a compiled program does, read out of the compiler's own text of it: which instructions run how often.

The text is XLA's optimized HLO as its TPU backend dumps it after generating code, where most instructions carry the
cycles that the compiler expects of them. Bodies of loops stand there once; how often they run is said beside the
loop. This module knows no program of ours and no machine.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_BODY, _CONDITION = re.compile(r"body=%?([\w.\-]+)"), re.compile(r"condition=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_INTEGER = re.compile(r"= [su]32\[\][^ ]* constant\((\d+)\)")
# The compiler writes the largest number there is where it has no idea.
_NO_IDEA = 2**62


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        result: The type of its result as it is written, layouts included.
        op_name: Where in the traced function it comes from.
        cycles: What the compiler expects it to take; 0 where it does not say.
        called: Computations that it names, those of branches in their order.
        trips: How often a loop's body runs; None where that is not known ahead, and for what is no loop.
    """

    name: str
    opcode: str
    result: str
    op_name: str
    cycles: int
    called: tuple[str, ...]
    trips: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and which of them it starts with."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, and how often one run of the program comes to it.

    Attributes:
        times: Bodies of loops whose length is not known ahead count once.
        each_turn: Whether it is in such a loop, so that `times` is that of each turn.
        fused: Whether it is part of a fusion, which carries the cycles of all its parts.
        computation: The name of the one that it stands in.
    """

    instruction: Instruction
    times: int
    each_turn: bool = False
    fused: bool = False
    computation: str = ""


def parse_module(text: str) -> Module:
    """The module that the compiler wrote down.

    Raises:
        ValueError: there is no entry computation in the text.
    """
    lines: dict[str, list[str]] = {}
    entry = current = None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = head[2]
            lines[current] = []
            entry = current if head[1] else entry
        elif line == "}":
            current = None
        elif current is not None and line.startswith("  "):
            lines[current].append(line.strip())
        elif current is not None and lines[current]:
            lines[current][-1] += line  # what a kernel says of itself has several lines
    if entry is None:
        raise ValueError(f"no ENTRY computation among {len(lines)}; is this the text of an HLO module?")
    parsed = {
        name: tuple(instruction for line in body if (instruction := _parse(line, lines)) is not None)
        for name, body in lines.items()
    }
    return Module(parsed, entry)


def executed(module: Module, taken: Collection[str] = ()) -> list[Executed]:
    """Every instruction that runs, those within fusions, loops and branches included.

    Of a conditional the branch for false runs, unless it is right within a scope of a name in `taken`: then it is the
    one for true.
    """
    found: list[Executed] = []

    def visit(computation: str, times: int, each_turn: bool, fused: bool) -> None:
        for instruction in module.computations.get(computation, ()):
            found.append(Executed(instruction, times, each_turn, fused, computation))
            is_loop, is_fusion = instruction.opcode == "while", instruction.opcode == "fusion"
            turns = 1 if not is_loop or instruction.trips is None else instruction.trips
            unknown = is_loop and instruction.trips is None
            for called in _runs(instruction, taken):
                visit(called, times * turns, each_turn or unknown, fused or is_fusion)

    visit(module.entry, 1, False, False)
    return found


def total_cycles(instructions: Collection[Executed]) -> int:
    """What the compiler expects all of them to take together, one after the other."""
    return sum(each.times * each.instruction.cycles for each in instructions if not each.fused)


def array_bytes(result: str) -> list[int]:
    """The bytes of each array in a type as HLO writes it, a tuple's in order; tokens and the like are left out."""
    return [
        math.prod(int(size) for size in shape.split(",") if size) * _bits(dtype) // 8
        for dtype, shape in _ARRAY.findall(_without_layouts(result))
    ]


def array_types(result: str) -> list[str]:
    """The element type of each array in a type as HLO writes it."""
    return [dtype for dtype, _ in _ARRAY.findall(_without_layouts(result))]


def _parse(line: str, lines: Mapping[str, list[str]]) -> Instruction | None:
    named = _NAME.match(line)
    if named is None:
        return None
    rest = line[named.end() - 1 :]
    opcode = _OPCODE.search(_skip_type(rest))
    if opcode is None:
        return None
    result = rest[: len(rest) - len(_skip_type(rest))].strip()
    cycles, trips, op_name = _CYCLES.search(line), None, _OP_NAME.search(line)
    called = tuple(_CALLED.findall(line))
    branches = _BRANCHES.search(line)
    if branches:
        listed = branches[1].replace("%", "").split(", ") if branches[1] else [branches[3], branches[2]]
        called = tuple(listed)
    if opcode[1] == "while":
        trips = _trip_count(line, lines)
        body = _BODY.search(line)
        called = (body[1],) if body else ()
    return Instruction(
        name=named[1],
        opcode=opcode[1],
        result=result,
        op_name=op_name[1] if op_name else "",
        cycles=int(cycles[1]) if cycles and int(cycles[1]) < _NO_IDEA else 0,
        called=called,
        trips=trips,
        text=line,
    )


def _skip_type(rest: str) -> str:
    """What follows the type at the start of this text; a tuple's type has parentheses and blanks within."""
    rest = rest.lstrip()
    if not rest.startswith("("):
        return " " + rest.split(" ", 1)[1] if " " in rest else ""
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[index + 1 :]
    return ""


def _trip_count(line: str, lines: Mapping[str, list[str]]) -> int | None:
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition = _CONDITION.search(line)
    body = lines.get(condition[1], []) if condition else []
    # A counted loop compares its counter with one constant, and that is all its condition does.
    bounds = [int(bound) for text in body for bound in _INTEGER.findall(text)]
    compares = [text for text in body if " compare(" in text or "fusion(" in text]
    return bounds[0] if len(bounds) == 1 and len(compares) == 1 and len(body) <= 6 else None


def _runs(instruction: Instruction, taken: Collection[str]) -> tuple[str, ...]:
    """Of the computations that an instruction names, those that it runs."""
    match instruction.opcode:
        case "conditional":
            is_taken = instruction.op_name.split("/")[-2:-1] in ([scope] for scope in taken)
            return instruction.called[-1:] if is_taken else instruction.called[:1]
        case "fusion" | "call" | "while" | "async-start":
            return instruction.called
        case _:  # reductions and comparisons: within the instruction's own cycles
            return ()


def _without_layouts(result: str) -> str:
    return re.sub(r"\{[^}]*\}", "", result)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return 8 if digits is None else int(digits[0])
