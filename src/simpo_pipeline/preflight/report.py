"""The report of a preflight, as text and as JSON, and its verdict."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simpo_pipeline.preflight.examine import ProgramFigures
from simpo_pipeline.preflight.memory import MemoryPhase
from simpo_pipeline.preflight.topology import Topology


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a preflight.

    Attributes:
        assumptions: Assumed values of quantities that only the job itself knows, by name.
        versions: Versions of jax, jaxlib and libtpu.
        refusals: Reasons why parts of the job could not be planned, one sentence each.
    """

    topology: Topology
    programs: Sequence[ProgramFigures]
    phases: Sequence[MemoryPhase]
    assumptions: Mapping[str, Any]
    versions: Mapping[str, str]
    refusals: Sequence[str] = ()

    @property
    def failures(self) -> list[str]:
        """Reasons why the job cannot run on the topology, one sentence each; empty if it can."""
        failed = list(self.refusals)
        failed += [
            f"{_where(each)} does not compile: {_first_line(each.error)}" for each in self.programs if each.error
        ]
        for same in _by_name(self.programs):
            if len({each.stablehlo for each in same}) > 1:
                failed.append(f"{same[0].name} is not the same program on all hosts")
        capacity = self.topology.chip.hbm_bytes
        failed += [
            f"'{phase.name}' needs {_gb(phase.total)} per chip, but a chip has {_gb(capacity)}"
            for phase in self.phases
            if phase.total > capacity
        ]
        return failed


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON, with sizes in bytes and times in seconds."""
    return {
        "topology": dataclasses.asdict(report.topology),
        "versions": dict(report.versions),
        "assumptions": dict(report.assumptions),
        "programs": [
            dataclasses.asdict(each)
            | {
                "peak_bytes": each.memory.peak if each.memory else None,
                "roofline_seconds": each.roofline.seconds if each.roofline else None,
                "estimate_seconds": each.estimate.seconds if each.estimate else None,
                "estimate_over_roofline": each.ratio or None,
            }
            for each in report.programs
        ],
        "phases": [dataclasses.asdict(phase) | {"total_bytes": phase.total} for phase in report.phases],
        "failures": report.failures,
        "fits": not report.failures,
    }


def as_text(report: Report) -> str:
    """Return the report as text for people."""
    chip = report.topology.chip
    head = [
        f"Preflight for {report.topology.name}: {report.topology.num_chips} {chip.name} chips on "
        f"{report.topology.num_hosts} hosts, compiled with {', '.join(f'{n} {v}' for n, v in report.versions.items())}",
        f"Each chip has {_gb(chip.hbm_bytes)} HBM, {chip.peak_flops / 1e12:.0f} TFLOP/s bf16, "
        f"{chip.hbm_bytes_per_second / 1e9:.0f} GB/s to HBM, {chip.link_bytes_per_second / 1e9:.0f} GB/s per link and "
        f"direction ({chip.source}).",
        *(f"Assumed: {name} {value}" for name, value in report.assumptions.items()),
    ]
    blocks = [_program_text(same, chip.hbm_bytes) for same in _by_name(report.programs)]
    return "\n\n".join(["\n".join(head), *blocks, _phases_text(report), _verdict(report)])


def _program_text(same: Sequence[ProgramFigures], capacity: int) -> str:
    # The slowest host represents all hosts. Their programs differ only in how collectives are routed.
    each = max(same, key=lambda one: one.estimate.seconds if one.estimate else 0.0)
    compiled_on = [str(one.host) for one in same if one.memory is not None]
    on_hosts = f", on each of {len(same)} hosts, compiled for {' and '.join(compiled_on)}"
    where = f"{each.num_chips} chips" + (on_hosts if len(same) > 1 else "")
    prints = {one.stablehlo for one in same}
    print_text = f"StableHLO {each.stablehlo[:12]}" + (" on all" if len(prints) == 1 and len(same) > 1 else "")
    lines = [f"{each.name} ({where}), {print_text if len(prints) == 1 else 'StableHLO DIFFERS'}"]
    broken = [one for one in same if one.error]
    if broken:
        return "\n".join([*lines, f"  DOES NOT COMPILE: {_first_line(broken[0].error)}"])
    assert each.memory is not None and each.roofline is not None and each.estimate is not None
    memory, bound, estimate = each.memory, each.roofline, each.estimate
    lines.append(
        f"  HBM          {_gb(memory.peak)} of {_gb(capacity)}: arguments {_gb(memory.arguments)}, outputs "
        f"{_gb(memory.outputs)} ({_gb(memory.aliased)} aliased to arguments), temporaries "
        f"{_gb(memory.temporary)}, code {_gb(memory.code)}"
    )
    unit = "" if each.turns == 1 else " per iteration"
    for traffic in each.traffic:
        lines.append(
            f"  {traffic.kind:<18} {traffic.dtype:<5} {traffic.count:>6} x{unit}, {_gb(traffic.received_bytes)} "
            f"received per chip, largest {_gb(traffic.largest_bytes)} {traffic.largest_type}"
        )
    if each.work.flops:
        repeated = f" and {each.work.repeated_flops:.3g} recomputed" if each.work.repeated_flops else ""
        lines.append(f"  model        {each.work.flops:.3g} FLOP{repeated}{unit}")
    if bound.seconds:
        lines.append(
            f"  roofline     {_ms(bound.seconds)}{unit}: compute {_ms(bound.compute_seconds)}, HBM "
            f"{_ms(bound.hbm_seconds)}, links {_ms(bound.link_seconds)}"
        )
    ratio = f", {each.ratio:.2f} x" if each.ratio else ""
    lines.append(
        f"  estimate     {_ms(estimate.seconds)}{unit}{ratio}: compiler {_ms(estimate.compiler_seconds)}, "
        f"kernels {_ms(estimate.kernel_seconds)}, exposed collectives {_ms(estimate.waited_seconds)}"
    )
    return "\n".join(lines)


def _phases_text(report: Report) -> str:
    lines = ["Live at once on each chip"]
    for phase in report.phases:
        beside = ", ".join(f"{name} {_gb(size)}" for name, size in phase.beside.items())
        lines.append(
            f"  {phase.name:<12} {_gb(phase.total)} of {_gb(report.topology.chip.hbm_bytes)}: {phase.program} "
            f"{_gb(phase.needs)}, alongside {beside}"
        )
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    if not report.failures:
        return f"Verdict: every program compiles for {report.topology.name}, and the whole job fits in memory."
    return "\n".join([f"Verdict: this job cannot run on {report.topology.name}.", *(f"  {f}" for f in report.failures)])


def _by_name(programs: Iterable[ProgramFigures]) -> list[list[ProgramFigures]]:
    by_name: dict[str, list[ProgramFigures]] = {}
    for each in programs:
        by_name.setdefault(each.name, []).append(each)
    return list(by_name.values())


def _where(each: ProgramFigures) -> str:
    return each.name if each.host is None else f"{each.name} on host {each.host}"


def _first_line(error: str) -> str:
    lines = list(itertools.islice((line for line in error.splitlines() if line.strip()), 1))
    return lines[0][:300] if lines else ""


def _gb(num_bytes: int | float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.2f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"
