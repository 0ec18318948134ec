"""What travels between chips in a program: collectives by kind and element type, and the bytes that each chip receives.

Received bytes are those of the bandwidth-optimal algorithms (rings) over a group of n chips, of data of B bytes:
all-gather to B, reduce-scatter of B, all-to-all of B each (n - 1) / n * B; all-reduce of B twice that; a
collective-permute B.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

from simpo_pipeline.preflight.hlo import Executed, array_bytes, array_types

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# How TPUs sum and scatter at once: a fusion by a computation of this name, of an all-reduce and a slice of its result,
# of which only the slice is made.
_SUMS_AND_SCATTERS = "all-reduce-scatter"
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind and element type in a program.

    Attributes:
        count: How many run.
        moved_bytes: Of their results on a chip; of a reduce-scatter's, its argument.
        received_bytes: What arrives at each chip.
        largest_bytes: Of the largest of them, counted as in `moved_bytes`.
        largest_type: Its result, as HLO writes it.
    """

    kind: str
    dtype: str
    count: int
    moved_bytes: int
    received_bytes: int | float
    largest_bytes: int
    largest_type: str


def traffic_of(instructions: Iterable[Executed], num_devices: int) -> list[Traffic]:
    """The collectives among the instructions, the kind and type that most bytes arrive by first."""
    groups: dict[tuple[str, str], list[tuple[int, int, float, str]]] = collections.defaultdict(list)
    for each in instructions:
        kind = each.instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        size = _group_size(each.instruction.text, num_devices)
        moved, dtype = _moved(kind, each.instruction.result, each.instruction.opcode.endswith("-start"), size)
        if kind == "all-reduce" and each.computation.startswith(_SUMS_AND_SCATTERS):
            kind = "reduce-scatter"
        received = _received_share(kind, size) * moved
        groups[kind, dtype].append((each.times, moved, received, each.instruction.result.lstrip("(").split("{")[0]))
    found = [
        Traffic(
            kind=kind,
            dtype=dtype,
            count=sum(times for times, *_ in members),
            moved_bytes=sum(times * moved for times, moved, *_ in members),
            received_bytes=sum(times * received for times, _, received, _ in members),
            largest_bytes=max(moved for _, moved, *_ in members),
            largest_type=max(members, key=lambda member: member[1])[3],
        )
        for (kind, dtype), members in groups.items()
    ]
    return sorted(found, key=lambda each: -each.received_bytes)


def _moved(kind: str, result: str, is_start: bool, group_size: int) -> tuple[int, str]:
    """(bytes, element type) of what a collective brings; one that has only started gives its arguments beside it."""
    sizes, types = array_bytes(result), array_types(result)
    if is_start and kind != "all-reduce" and len(sizes) > 1:
        # (arguments, results, and contexts of 4 bytes each); the gathered side is the larger one.
        index = max(range(len(sizes)), key=sizes.__getitem__)
        return sizes[index], types[index]
    total = sum(sizes)
    return (total * group_size if kind == "reduce-scatter" else total), types[0] if types else ""


def _received_share(kind: str, group_size: int) -> float:
    if kind == "collective-permute":
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (group_size - 1) / group_size


def _group_size(text: str, num_devices: int) -> int:
    listed, iota, mesh = _LISTED_GROUPS.search(text), _IOTA_GROUPS.search(text), _MESH_GROUPS.search(text)
    if listed:
        return len(listed[1].split(","))
    if iota:
        return int(iota[2])
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return num_devices
