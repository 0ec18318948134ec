"""Traffic between the chips of a program: collectives by kind and element type, and the bytes that each chip receives.

Received bytes are those of the bandwidth-optimal (ring) algorithms over a group of n chips:

- all-gather to B bytes, reduce-scatter of B bytes, all-to-all of B bytes: (n - 1) / n * B
- all-reduce of B bytes: 2 * (n - 1) / n * B
- collective-permute of B bytes: B
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

from simpo_pipeline.preflight.hlo import ExecutedInstruction, array_bytes, array_types

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Name prefix of the fused computation that implements a reduce-scatter on TPUs. It consists of an all-reduce and a
# slice of its result; only the slice is materialized.
_SUMS_AND_SCATTERS = "all-reduce-scatter"
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind and element type in a program.

    Attributes:
        count: Number of executions.
        moved_bytes: Bytes of their results on one chip; for a reduce-scatter, bytes of its argument.
        received_bytes: Bytes that each chip receives.
        largest_bytes: Bytes of the largest collective, counted as in `moved_bytes`.
        largest_type: Result type of the largest collective, as written in HLO.
    """

    kind: str
    dtype: str
    count: int
    moved_bytes: int
    received_bytes: int | float
    largest_bytes: int
    largest_type: str


def traffic_of(instructions: Iterable[ExecutedInstruction], num_devices: int) -> list[Traffic]:
    """Return the collectives among the instructions, by kind and type, with the most received bytes first."""
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
    """Return (bytes, element type) of the data of a collective. The result of a `-start` also holds its arguments."""
    sizes, types = array_bytes(result), array_types(result)
    if is_start and kind != "all-reduce" and len(sizes) > 1:
        # The tuple contains arguments, results, and contexts of 4 bytes each. The gathered side is the largest element.
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
