"""A parser for the text of a compiled program: which instructions run, and how often.

The text is XLA's optimized HLO as its TPU backend dumps it after code generation. Most instructions carry the cycles
that the compiler expects. The body of a loop appears once, and the loop instruction states how often it runs. This
module does not depend on the job's programs or on a machine.
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
# The compiler writes the largest integer where it has no estimate.
_NO_ESTIMATE = 2**62


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        result: The type of its result as written, including layouts.
        op_name: Its origin in the traced function.
        cycles: Cycles that the compiler expects; 0 if it gives no estimate.
        called: Computations that it names; those of branches are in order.
        trips: Trip count of a loop; None if it is not known at compile time, or if the instruction is not a loop.
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
    """The computations of a program by name, and the name of its entry computation."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str


@dataclasses.dataclass(frozen=True)
class ExecutedInstruction:
    """An instruction, and how often one run of the program executes it.

    Attributes:
        times: Number of executions. The body of a loop whose length is not known at compile time counts once.
        each_turn: Whether it is in such a loop, so that `times` counts the executions per iteration.
        fused: Whether it is part of a fusion, which carries the cycles of all its parts.
        computation: The name of the computation that contains it.
    """

    instruction: Instruction
    times: int
    each_turn: bool = False
    fused: bool = False
    computation: str = ""


def parse_module(text: str) -> Module:
    """Parse the text of an HLO module.

    Raises:
        ValueError: the text contains no entry computation.
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
            lines[current][-1] += line  # the description of a kernel spans several lines
    if entry is None:
        raise ValueError(f"no ENTRY computation among {len(lines)} computations; is this the text of an HLO module?")
    parsed = {
        name: tuple(instruction for line in body if (instruction := _parse(line, lines)) is not None)
        for name, body in lines.items()
    }
    return Module(parsed, entry)


def executed(module: Module, taken: Collection[str] = ()) -> list[ExecutedInstruction]:
    """Return every instruction that runs, including those within fusions, loops and branches.

    A conditional is assumed to run its false branch. If it is directly within a scope that is named in `taken`, it is
    assumed to run its true branch.
    """
    found: list[ExecutedInstruction] = []

    def visit(computation: str, times: int, each_turn: bool, fused: bool) -> None:
        for instruction in module.computations.get(computation, ()):
            found.append(ExecutedInstruction(instruction, times, each_turn, fused, computation))
            is_loop, is_fusion = instruction.opcode == "while", instruction.opcode == "fusion"
            turns = 1 if not is_loop or instruction.trips is None else instruction.trips
            unknown = is_loop and instruction.trips is None
            for called in _executed_computations(instruction, taken):
                visit(called, times * turns, each_turn or unknown, fused or is_fusion)

    visit(module.entry, 1, False, False)
    return found


def total_cycles(instructions: Collection[ExecutedInstruction]) -> int:
    """Return the cycles that the compiler expects for all instructions, run one after the other."""
    return sum(each.times * each.instruction.cycles for each in instructions if not each.fused)


def array_bytes(result: str) -> list[int]:
    """Return the bytes of each array in an HLO type, in order for a tuple. Tokens and similar types are skipped."""
    return [
        math.prod(int(size) for size in shape.split(",") if size) * _bits(dtype) // 8
        for dtype, shape in _ARRAY.findall(_without_layouts(result))
    ]


def array_types(result: str) -> list[str]:
    """Return the element type of each array in an HLO type."""
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
        cycles=int(cycles[1]) if cycles and int(cycles[1]) < _NO_ESTIMATE else 0,
        called=called,
        trips=trips,
        text=line,
    )


def _skip_type(rest: str) -> str:
    """Return the text after the leading type. The type of a tuple contains parentheses and spaces."""
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
    # The condition of a counted loop only compares the counter with one constant.
    bounds = [int(bound) for text in body for bound in _INTEGER.findall(text)]
    compares = [text for text in body if " compare(" in text or "fusion(" in text]
    return bounds[0] if len(bounds) == 1 and len(compares) == 1 and len(body) <= 6 else None


def _executed_computations(instruction: Instruction, taken: Collection[str]) -> tuple[str, ...]:
    """Return the computations that an instruction runs, out of those that it names."""
    match instruction.opcode:
        case "conditional":
            is_taken = instruction.op_name.split("/")[-2:-1] in ([scope] for scope in taken)
            return instruction.called[-1:] if is_taken else instruction.called[:1]
        case "fusion" | "call" | "while" | "async-start":
            return instruction.called
        case _:  # reductions and comparisons are included in the instruction's own cycles
            return ()


def _without_layouts(result: str) -> str:
    return re.sub(r"\{[^}]*\}", "", result)


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return 8 if digits is None else int(digits[0])
