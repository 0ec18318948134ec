"""Memory on a chip in each phase of a job: the peak of the running program and everything else that is live."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Memory that one program needs on each chip while it runs, in bytes, as reported by the compiler."""

    arguments: int
    outputs: int
    aliased: int
    """Donated arguments that become outputs, so that they are counted once."""
    temporary: int
    code: int

    @property
    def peak(self) -> int:
        """All bytes that are live at once, including code."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class MemoryPhase:
    """One phase of the job: what is live throughout, and the program with the highest peak.

    Attributes:
        beside: Bytes on each chip that are live but are not arguments of the program, by name.
        program: Name of the program.
        needs: Peak of the program itself, in bytes.
    """

    name: str
    beside: Mapping[str, int]
    program: str
    needs: int

    @property
    def total(self) -> int:
        """All bytes that are live at once."""
        return sum(self.beside.values()) + self.needs


def phase(name: str, beside: Mapping[str, int], programs: Mapping[str, ProgramMemory], all_code: int) -> MemoryPhase:
    """Return the phase in which `programs` run one after the other while `beside` is live.

    The code of all programs of the job stays loaded. The code of the running program is part of its own peak.
    """
    largest = max(programs, key=lambda program: programs[program].peak)
    needs = programs[largest]
    return MemoryPhase(name, {**beside, "code of the other programs": all_code - needs.code}, largest, needs.peak)
