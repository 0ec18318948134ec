"""Compilation of one program for devices that are not present, and the compiler's result."""

import dataclasses
import logging
import pathlib
import tempfile
import time
from typing import Any

from simpo_pipeline.distributed.compilation_cache import opened_cache
from simpo_pipeline.distributed.programs import LoweredProgram, Program, Programs, lower_program
from simpo_pipeline.errors import ProgramError
from simpo_pipeline.preflight.cache import ResultCache

logger = logging.getLogger(__name__)

_MEMORY_FIELDS = ("argument", "output", "alias", "temp", "generated_code")


@dataclasses.dataclass(frozen=True)
class CompilerResult:
    """The compiler's result for one program.

    Attributes:
        memory: Bytes on each device of arguments, outputs, aliases (arguments that become outputs), temporaries and
            code, by the names in `_MEMORY_FIELDS`; empty if the program did not compile.
        hlo: The optimized program, with the cycles that the compiler expects.
        error: The reason why the program did not compile; empty if it did.
        seconds: Compile time.
    """

    memory: dict[str, int]
    hlo: str
    error: str
    seconds: float


class PlannedProgram(Program):
    """A program that was lowered but is never run here."""

    def __init__(self, lowered: LoweredProgram) -> None:
        self.name = lowered.name
        self.fingerprint = lowered.fingerprint

    def __call__(self, *args: Any) -> Any:
        """Raise ProgramError."""
        raise ProgramError(f"{self.name!r} was lowered for a description of devices; only a job on them can run it")


class PlannedPrograms(Programs):
    """A substitute for the `Programs` of a job that stores lowered programs instead of compiling them."""

    def __init__(self) -> None:
        super().__init__()
        self.lowered: list[LoweredProgram] = []

    def compile(self, name: str, function: Any, *abstract_args: Any, **how: Any) -> Program:
        """Lower a program and store it."""
        self.lowered.append(lower_program(name, function, *abstract_args, **how))
        return PlannedProgram(self.lowered[-1])


def compile_ahead(program: LoweredProgram, cache: ResultCache) -> CompilerResult:
    """Return the compiler's result for a program, from the cache if it was compiled before."""
    known = cache.read(program.fingerprint)
    if known is not None:
        return CompilerResult(**known)
    logger.info("compiling %s", program.name)
    result = _compile(program)
    logger.info("compiled %s in %.1f s", program.name, result.seconds)
    cache.write(program.fingerprint, dataclasses.asdict(result))
    return result


def _compile(program: LoweredProgram) -> CompilerResult:
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        # The HLO is read from a dump, because `as_text` fails on TPU programs with asynchronous collectives.
        start = time.perf_counter()
        try:
            # jax's own cache writes entries for devices that are not present, and cannot read them again.
            with opened_cache(None):
                compiled = program.compile(xla_dump_to=folder, xla_dump_hlo_as_text=True)
        except (OSError, MemoryError):  # a problem of this machine, not of the program
            raise
        except Exception as error:  # mostly XLA's RuntimeError, sometimes ValueError; the report shows it
            return CompilerResult({}, "", f"{type(error).__name__}: {error}", time.perf_counter() - start)
        seconds = time.perf_counter() - start
        stats = compiled.memory_analysis()
        memory = {name: int(getattr(stats, f"{name}_size_in_bytes")) for name in _MEMORY_FIELDS}
        (text,) = pathlib.Path(folder).glob("*after_codegen.txt")
        return CompilerResult(memory, text.read_text(), "", seconds)
