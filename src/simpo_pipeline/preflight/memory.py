"""Whether a job fits: what is live on a chip in each phase of it, beside what the running program itself needs."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What one program needs on each chip while it runs, in bytes, as the compiler says."""

    arguments: int
    outputs: int
    aliased: int
    """Arguments that become outputs, counted once: the caller gave them away."""
    temporary: int
    code: int

    @property
    def peak(self) -> int:
        """All that is live at once, its code included."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of the job: what lives through it, and the hungriest program that runs in it.

    Attributes:
        beside: Bytes on each chip of what the program does not take as an argument, by name.
        program: Its name.
        needs: The program's own peak.
    """

    name: str
    beside: Mapping[str, int]
    program: str
    needs: int

    @property
    def total(self) -> int:
        """All that is live at once."""
        return sum(self.beside.values()) + self.needs


def phase(name: str, beside: Mapping[str, int], programs: Mapping[str, ProgramMemory], all_code: int) -> Phase:
    """The phase in which these programs run, one after the other, beside what lives through it.

    The code of all programs of the job stays loaded; that of the running one is part of its own peak.
    """
    hungriest = max(programs, key=lambda program: programs[program].peak)
    needs = programs[hungriest]
    return Phase(name, {**beside, "code of the other programs": all_code - needs.code}, hungriest, needs.peak)
