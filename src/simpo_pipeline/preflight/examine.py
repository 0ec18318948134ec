"""From one program and its work to the figures of the report."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from simpo_pipeline.distributed.programs import LoweredProgram
from simpo_pipeline.preflight.collectives import KINDS, Traffic, traffic_of
from simpo_pipeline.preflight.compiled import CompilerResult
from simpo_pipeline.preflight.hlo import Executed, array_bytes, executed, parse_module, total_cycles
from simpo_pipeline.preflight.memory import ProgramMemory
from simpo_pipeline.preflight.roofline import Roofline, Work, kernel_seconds, roofline
from simpo_pipeline.preflight.topology import Chip, farthest_hops, fewest_links

# What a message takes over one link however short it is; "about 1 us a hop", How to Scale Your Model (jax-ml).
HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program of the job, and what it has to do.

    Attributes:
        host: Whose own devices it runs on; None for one that spans the job.
        turns: Turns of its loop of unknown length in one call; 1 where there is none. Figures in seconds, and `work`,
            are those of one turn.
    """

    lowered: LoweredProgram
    work: Work
    host: int | None
    turns: int = 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one turn, as far as the compiler and arithmetic can tell: one part after the other.

    Attributes:
        compiler_seconds: Cycles that the compiler expects; it gives none for kernels and collectives.
        kernel_seconds: Pallas kernels at their own roofline.
        waited_seconds: Collectives that nothing is computed beside, at the links' speed and with their latency.
    """

    compiler_seconds: float
    kernel_seconds: float
    waited_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compiler_seconds + self.kernel_seconds + self.waited_seconds


@dataclasses.dataclass(frozen=True)
class Examined:
    """What is known of one program; without `memory`, `roofline` and `estimate` where it was not or did not compile."""

    name: str
    host: int | None
    num_chips: int
    turns: int
    stablehlo: str
    work: Work
    compile_seconds: float = 0.0
    error: str = ""
    memory: ProgramMemory | None = None
    traffic: tuple[Traffic, ...] = ()
    roofline: Roofline | None = None
    estimate: Estimate | None = None
    largest_copy_bytes: int = 0
    """Of the copies from HBM to HBM that run in a loop, the largest one's."""

    @property
    def ratio(self) -> float:
        """The estimate over the bound; 0 where there is none."""
        if self.estimate is None or self.roofline is None or not self.roofline.seconds:
            return 0.0
        return self.estimate.seconds / self.roofline.seconds


def examine(planned: Planned, result: CompilerResult | None, chip: Chip) -> Examined:
    """The figures of a program, as far as the compiler was asked."""
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
        return Examined(**known)
    known["compile_seconds"] = result.seconds
    if result.error:
        return Examined(**known, error=result.error)
    instructions = executed(parse_module(result.hlo), planned.work.scopes)
    traffic = _each_turn(instructions, planned.turns, len(devices))
    received = sum(each.received_bytes for each in traffic)
    links = fewest_links(devices)
    return Examined(
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


def largest_copy(instructions: Sequence[Executed]) -> int:
    """Bytes of the largest copy within a loop; of what is only moved to another memory the copy says so itself."""
    in_loops = (each for each in instructions if each.each_turn or each.times > 1)
    sizes = [sum(array_bytes(each.instruction.result)) for each in in_loops if each.instruction.opcode == "copy"]
    return max(sizes, default=0)


def _each_turn(instructions: Sequence[Executed], turns: int, num_devices: int) -> list[Traffic]:
    """Collectives of the loop where there is one: those before and after it are few and small."""
    looped = [each for each in instructions if each.each_turn]
    return traffic_of(looped if turns > 1 else instructions, num_devices)


def _estimate(planned: Planned, instructions: Sequence[Executed], chip: Chip, devices: Sequence[Any]) -> Estimate:
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
