"""Figures of the report for one program, derived from its compiler result and its work."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from simpo_pipeline.distributed.programs import LoweredProgram
from simpo_pipeline.preflight.collectives import KINDS, Traffic, traffic_of
from simpo_pipeline.preflight.compiled import CompilerResult
from simpo_pipeline.preflight.hlo import ExecutedInstruction, array_bytes, executed, parse_module, total_cycles
from simpo_pipeline.preflight.memory import ProgramMemory
from simpo_pipeline.preflight.roofline import ProgramWork, Roofline, kernel_seconds, roofline
from simpo_pipeline.preflight.topology import Chip, farthest_hops, fewest_links

# Latency of one link for a message of any size; "about 1 us a hop", How to Scale Your Model (jax-ml).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class PlannedLaunch:
    """A program of the job, and its work.

    Attributes:
        host: The host on whose devices it runs; None for a program that spans the job.
        turns: Iterations per call of its loop of unknown length; 1 if it has none. Figures in seconds and `work` are
            those of one iteration.
    """

    lowered: LoweredProgram
    work: ProgramWork
    host: int | None
    turns: int = 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one iteration, if its parts run one after the other.

    Attributes:
        compiler_seconds: Time for the cycles that the compiler expects. It reports none for kernels and collectives.
        kernel_seconds: Time of Pallas kernels at their own roofline.
        waited_seconds: Time of collectives that do not overlap with computation, at the speed and latency of the links.
    """

    compiler_seconds: float
    kernel_seconds: float
    waited_seconds: float

    @property
    def seconds(self) -> float:
        """Sum of all parts."""
        return self.compiler_seconds + self.kernel_seconds + self.waited_seconds


@dataclasses.dataclass(frozen=True)
class ProgramFigures:
    """Figures of one program. `memory`, `roofline` and `estimate` are None without a successful compilation."""

    name: str
    host: int | None
    num_chips: int
    turns: int
    stablehlo: str
    work: ProgramWork
    compile_seconds: float = 0.0
    error: str = ""
    memory: ProgramMemory | None = None
    traffic: tuple[Traffic, ...] = ()
    roofline: Roofline | None = None
    estimate: Estimate | None = None
    largest_copy_bytes: int = 0
    """Bytes of the largest copy from HBM to HBM that runs in a loop."""

    @property
    def ratio(self) -> float:
        """The estimate divided by the roofline; 0 if either is missing."""
        if self.estimate is None or self.roofline is None or not self.roofline.seconds:
            return 0.0
        return self.estimate.seconds / self.roofline.seconds


def examine(planned: PlannedLaunch, result: CompilerResult | None, chip: Chip) -> ProgramFigures:
    """Return the figures of a program. Without a compiler result, only those known before compilation are set."""
    devices = list(planned.lowered.devices)
    known: dict[str, Any] = {
        "name": planned.lowered.name,
        "host": planned.host,
        "num_chips": len(devices),
        "turns": planned.turns,
        "stablehlo": planned.lowered.stablehlo_fingerprint,
        "work": planned.work,
    }
    if result is None:
        return ProgramFigures(**known)
    known["compile_seconds"] = result.seconds
    if result.error:
        return ProgramFigures(**known, error=result.error)
    instructions = executed(parse_module(result.hlo), planned.work.scopes)
    traffic = _each_turn(instructions, planned.turns, len(devices))
    received = sum(each.received_bytes for each in traffic)
    links = fewest_links(devices)
    return ProgramFigures(
        **known,
        memory=ProgramMemory(
            arguments=result.memory["argument"],
            outputs=result.memory["output"],
            aliased=result.memory["alias"],
            temporary=result.memory["temp"],
            code=result.memory["generated_code"],
        ),
        traffic=tuple(traffic),
        roofline=roofline(planned.work, chip, len(devices), received, links),
        estimate=_estimate(planned, instructions, chip, devices),
        largest_copy_bytes=largest_copy(instructions),
    )


def largest_copy(instructions: Sequence[ExecutedInstruction]) -> int:
    """Return the bytes of the largest copy within a loop. A move to another memory has a different opcode."""
    in_loops = (each for each in instructions if each.each_turn or each.times > 1)
    sizes = [sum(array_bytes(each.instruction.result)) for each in in_loops if each.instruction.opcode == "copy"]
    return max(sizes, default=0)


def _each_turn(instructions: Sequence[ExecutedInstruction], turns: int, num_devices: int) -> list[Traffic]:
    """Return the collectives of the loop if there is one. Those before and after it are few and small."""
    looped = [each for each in instructions if each.each_turn]
    return traffic_of(looped if turns > 1 else instructions, num_devices)


def _estimate(
    planned: PlannedLaunch, instructions: Sequence[ExecutedInstruction], chip: Chip, devices: Sequence[Any]
) -> Estimate:
    once = total_cycles([each for each in instructions if not each.each_turn])
    each_turn = total_cycles([each for each in instructions if each.each_turn])
    waited = [each for each in instructions if each.instruction.opcode in KINDS]
    traffic = _each_turn(waited, planned.turns, len(devices))
    bandwidth = fewest_links(devices) * chip.link_bytes_per_second
    latency = farthest_hops(devices) * HOP_SECONDS
    return Estimate(
        compiler_seconds=(each_turn + once / planned.turns) / chip.clock_hz,
        kernel_seconds=kernel_seconds(planned.work, chip, len(devices)),
        waited_seconds=sum(each.received_bytes / bandwidth + each.count * latency for each in traffic),
    )
