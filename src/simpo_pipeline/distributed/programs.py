"""Device programs: compiled ahead of time under a name, fingerprinted, agreed on, and launched through the ledger.

A program that spans processes is compared across them before it is compiled. Every process reports a difference, with
the first line that differs. Everything that this package runs on a device is a `Program`. After `forbid_strays()`, jax
refuses every other execution, so a stray eager operation raises on the host that issued it before it reaches a device.
Nothing here knows what a program computes.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from simpo_pipeline.distributed.compilation_cache import CompilationCache, opened_cache
from simpo_pipeline.distributed.group import ProcessGroup
from simpo_pipeline.distributed.ledger import Launch, Ledger, call_site
from simpo_pipeline.errors import ProgramError

BuiltT = TypeVar("BuiltT")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MemoryBytes:
    """Memory statistics that the compiler reports for one program, in bytes per device."""

    arguments: int
    outputs: int
    aliased: int
    temporary: int

    @property
    def peak(self) -> int:
        """Size of arguments, outputs and temporaries together. Donated buffers are counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporary


@dataclasses.dataclass(frozen=True, eq=False)
class LoweredProgram:
    """A program as it is passed to the compiler.

    Attributes:
        parts: Everything that defines the program, by name.
        devices: Devices that it runs on; empty if it runs on the default device.
        options: Compiler options for this program only.
    """

    name: str
    lowered: jax.stages.Lowered
    parts: Mapping[str, str]
    devices: frozenset[Any]
    options: Mapping[str, bool | int]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the parts, equal in all processes that compile the same program for the same devices."""
        return hashlib.sha256("\0".join(self.parts.values()).encode()).hexdigest()

    @functools.cached_property
    def stablehlo_fingerprint(self) -> str:
        """SHA-256 (hex) of the program's StableHLO text, which does not name devices."""
        return hashlib.sha256(self.parts["StableHLO"].encode()).hexdigest()

    def compile(self, **more_options: str | bool | int) -> jax.stages.Compiled:
        """Compile the program and return the executable. `more_options` are added to the compiler options."""
        options: dict[str, Any] = {**self.options, **more_options}
        return self.lowered.compile(options)

    @property
    def launch(self) -> Launch:
        """The launch that the ledger records for this program."""
        num_processes = len({device.process_index for device in self.devices})
        return Launch(self.name, self.fingerprint, max(1, len(self.devices)), max(1, num_processes))


class Program:
    """An XLA executable with a name. Calling it launches it and records the launch.

    Arguments must match the abstract arguments that it was compiled for in tree structure, shape, dtype and sharding.
    """

    def __init__(self, launch: Launch, compiled: jax.stages.Compiled, before_launch: Callable[[Launch], None]):
        self.name = launch.program
        self.fingerprint = launch.fingerprint
        self._launch = launch
        self._compiled = compiled
        self._before_launch = before_launch

    @property
    def memory_bytes(self) -> MemoryBytes:
        """The memory that this program needs, as reported by the compiler."""
        stats = self._compiled.memory_analysis()
        if stats is None:
            raise ProgramError(f"this backend reports no memory statistics for {self.name!r}; run on cpu, gpu or tpu")
        return MemoryBytes(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporary=stats.temp_size_in_bytes,
        )

    def as_text(self) -> str:
        """Return the optimized HLO, for people and for tests that search it for collectives."""
        return self._compiled.as_text() or ""

    def __call__(self, *args: Any) -> Any:
        self._before_launch(self._launch)
        # After `forbid_strays()`, execution is allowed only here. The permission is local to this thread.
        with jax.no_execution(False):
            return self._compiled(*args)


class Programs:
    """Compiler and store of the programs of one job, and owner of its ledger."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        check_launches: bool = False,
        cache: CompilationCache | None = None,
    ) -> None:
        """Create an empty store. `cache` is the open compilation cache, if there is one.

        `check_launches` makes all processes meet before each launch of a program that spans them. A launch that the
        others do not make then raises in every process, with its line, before it reaches a device. Otherwise the
        monitor finds it a moment later. The check costs a few milliseconds per launch.
        """
        self.ledger = Ledger() if group is None else group.ledger
        self._group = group
        self._check_launches = check_launches
        self._cache = cache
        self._by_fingerprint: dict[tuple[str, str], Program] = {}
        self._built: dict[Hashable, Any] = {}

    def compile(
        self,
        name: str,
        function: Callable[..., Any],
        *abstract_args: Any,
        donate_argnums: Sequence[int] = (),
        out_shardings: Any = None,
        compiler_options: Mapping[str, bool | int] | None = None,
    ) -> Program:
        """Compile `function` ahead of time for the given abstract arguments.

        A program that lowers to the same text for the same devices is compiled only once; later calls return it again.

        Args:
            name: Name of the program in logs, ledger and errors.
            function: A function of positional arguments that takes and returns pytrees.
            abstract_args: Pytrees of `jax.ShapeDtypeStruct`, with shardings if a mesh is used.
            donate_argnums: Arguments whose buffers the program may reuse. The caller's arrays are invalid afterwards.
            out_shardings: As in `jax.jit`; None leaves the choice to the compiler.
            compiler_options: XLA debug options by name, for this program only.

        Raises:
            ProgramError: the program spans processes and is not the same in all of them.
        """
        start = time.perf_counter()
        lower = functools.partial(
            lower_program,
            name,
            function,
            *abstract_args,
            donate_argnums=donate_argnums,
            out_shardings=out_shardings,
            compiler_options=compiler_options,
        )
        lowered = lower()
        launch = lowered.launch
        known = self._by_fingerprint.get((name, launch.fingerprint))
        group = self._group if launch.num_processes > 1 else None
        if group is not None:
            known_by = agree_on_program(group, name, launch.fingerprint, lowered.parts, known is not None)
            # A process whose compiler failed lacks the program that the others have. Then all compile it again.
            known = known if all(known_by) else None
        if known is not None:
            return known
        if group is not None and next(iter(lowered.devices)).platform == "cpu":
            compiled = self._compile_or_load_everywhere(group, lowered, lower, start)
        else:
            compiled, _ = self._compile_or_load(lowered, start)
        self._show_progress()
        made = Program(launch, compiled, self._before_launch)
        self._by_fingerprint[name, launch.fingerprint] = made
        return made

    def built_once(self, key: Hashable, build: Callable[[], BuiltT]) -> BuiltT:
        """Return the earlier result of `build` for an equal key; call `build` the first time.

        Tracing and lowering take seconds, even if the executable is already known. The key must contain everything that
        the programs are built from, and every process must request equal keys in the same order.
        """
        if key not in self._built:
            self._built[key] = build()
        return self._built[key]

    def _compile_or_load_everywhere(
        self, group: ProcessGroup, lowered: LoweredProgram, lower: Callable[[], LoweredProgram], start: float
    ) -> jax.stages.Compiled:
        """Load a program in all processes, or compile it in all of them.

        XLA's CPU backend orders the collectives of a loaded executable differently from those of a freshly compiled
        one. Gloo matches messages only by their order. If processes mix the two, Gloo aborts or a process receives the
        wrong array.
        """
        if self._cache is None:
            # Disable jax's own cache, if there is one, because only process 0 writes to it.
            with opened_cache(None):
                compiled, is_hit = self._compile_or_load(lowered, start)
        else:
            compiled, is_hit = self._compile_or_load(lowered, start)
        hits: list[bool] = group.gather(is_hit)
        if not is_hit or all(hits):
            return compiled
        assert self._cache is not None
        self._cache.count_last_as_miss()
        missing = ", ".join(str(index) for index, hit in enumerate(hits) if not hit)
        logger.info("compiling %s here too, because process %s did not find it in the cache", lowered.name, missing)
        # `lowered.compile()` would return the loaded executable again: jax keeps it for this lowering.
        again = lower()
        if again.fingerprint != lowered.fingerprint:
            raise ProgramError(
                f"program {lowered.name!r} is different each time it is traced; build it only from "
                "values that do not change"
            )
        with opened_cache(None):
            compiled = again.compile()
        logger.info("compiled %s in %.1f s (%s)", *_log_args(lowered, start))
        return compiled

    def _compile_or_load(self, lowered: LoweredProgram, start: float) -> tuple[jax.stages.Compiled, bool]:
        """Return the executable and whether it was loaded from the cache."""
        if self._cache is None:
            compiled, is_hit = lowered.compile(), False
        else:
            has_callbacks = "callback" in lowered.parts["StableHLO"]
            compiled, is_hit = self._cache.compile(lowered.name, lowered.compile, has_callbacks=has_callbacks)
        logger.info(
            "read compiled %s in %.1f s (%s)" if is_hit else "compiled %s in %.1f s (%s)", *_log_args(lowered, start)
        )
        return compiled, is_hit

    def _before_launch(self, launch: Launch) -> None:
        if self._check_launches and self._group is not None and launch.num_processes > 1:
            agree_on_launch(self._group, launch)
        self.ledger.record(launch)
        self._show_progress()

    def _show_progress(self) -> None:
        if self._group is not None:
            self._group.standing.progress()


def _log_args(lowered: LoweredProgram, start: float) -> tuple[str, float, str]:
    return lowered.name, time.perf_counter() - start, lowered.launch.fingerprint[:12]


def lower_program(
    name: str,
    function: Callable[..., Any],
    *abstract_args: Any,
    donate_argnums: Sequence[int] = (),
    out_shardings: Any = None,
    compiler_options: Mapping[str, bool | int] | None = None,
) -> LoweredProgram:
    """Lower a program, from the arguments of `Programs.compile`. Descriptions of devices are allowed too."""

    def program(*args: Any) -> Any:
        return function(*args)

    # Kernels put the names of their source files into the text. With folder names, the text would differ on a host or
    # in an environment where the files are in another folder.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", "^.*/")
    program.__name__ = program.__qualname__ = name
    jitted = jax.jit(program, donate_argnums=tuple(donate_argnums), out_shardings=out_shardings)
    lowered = jitted.lower(*abstract_args)
    options = dict(compiler_options or {})
    parts = _parts(lowered.as_text(), abstract_args, out_shardings) | {"compiler options": str(options)}
    return LoweredProgram(name, lowered, parts, frozenset(_devices_of(abstract_args, out_shardings)), options)


def agree_on_program(
    group: ProcessGroup, name: str, fingerprint: str, parts: Mapping[str, str], is_known: bool
) -> list[bool]:
    """Check that all processes are about to compile the same program. Return which of them already know it.

    Raises:
        ProgramError: in every process, naming the program, the processes, and the first line that differs.
    """
    gathered: list[tuple[list[str], bool]] = group.gather([[name, fingerprint], is_known])
    programs = [program for program, _ in gathered]
    if all(program == programs[0] for program in programs):
        return [known for _, known in gathered]
    all_parts: list[dict[str, str]] = group.gather({"name": name, **parts})
    other = next(index for index, program in enumerate(programs) if program != programs[0])
    others = [str(index) for index, program in enumerate(programs) if program != programs[0]]
    raise ProgramError(
        f"program {all_parts[other]['name']!r} of process {', '.join(others)} is not program "
        f"{all_parts[0]['name']!r} of process 0: {first_difference(all_parts[0], all_parts[other])}. Nothing was "
        "launched. Start every process with the same code, versions, flags and config, and build programs only from "
        "values that are equal on all hosts."
    )


def agree_on_launch(group: ProcessGroup, launch: Launch) -> None:
    """Check that all processes are about to launch the same program.

    Raises:
        ProgramError: in every process, naming what each would launch.
    """
    gathered: list[list[str]] = group.gather([launch.program, launch.fingerprint])
    if any(theirs != gathered[0] for theirs in gathered):
        names = "; ".join(
            f"process {index} would launch {program!r} ({fingerprint[:12]})"
            for index, (program, fingerprint) in enumerate(gathered)
        )
        raise ProgramError(
            f"{names}, at {call_site()}. Nothing was launched; all processes must launch the same programs in the "
            "same order."
        )


def first_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Describe the first line in which two programs differ, and the part of the program that contains it."""
    for part, text in ours.items():
        lines, other_lines = text.splitlines() or [""], theirs[part].splitlines() or [""]
        for number, (line, other) in enumerate(itertools.zip_longest(lines, other_lines, fillvalue="nothing"), 1):
            if line != other:
                return f"{part} differs at line {number}, {line.strip()!r} in process 0 and {other.strip()!r} there"
    return "they have different fingerprints"


def forbid_strays() -> None:
    """Make jax raise, in all threads, for every execution that does not come from a `Program`."""
    jax.config.update("jax_no_execution", True)


def allow_strays() -> None:
    """Undo `forbid_strays`."""
    jax.config.update("jax_no_execution", False)


def _parts(stablehlo: str, abstract_args: Any, out_shardings: Any) -> dict[str, str]:
    """Return everything that defines a program, by name."""
    # The lowered text, not the compiled one: chip coordinates affect compilation, so the optimized HLO of the same
    # program differs between the hosts of a pod. StableHLO does not name the devices, so shardings are added.
    shardings = [_describe(sharding) for sharding in _shardings((abstract_args, out_shardings))]
    return {
        **{package: _version(package) for package in ("jax", "jaxlib", "libtpu")},
        **{variable: os.environ.get(variable, "") for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "StableHLO": stablehlo,
        "shardings": "\n".join(shardings),
    }


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _describe(sharding: jax.sharding.Sharding) -> str:
    if isinstance(sharding, jax.sharding.NamedSharding):
        mesh = sharding.mesh
        device_ids = np.asarray(mesh.device_ids).tolist()
        return f"{mesh.axis_names} {mesh.axis_sizes} {device_ids} {sharding.spec}"
    return str(sharding)


def _shardings(tree: Any) -> list[jax.sharding.Sharding]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.Sharding))
    found = (leaf if isinstance(leaf, jax.sharding.Sharding) else getattr(leaf, "sharding", None) for leaf in leaves)
    return [sharding for sharding in found if sharding is not None]


def _devices_of(abstract_args: Any, out_shardings: Any) -> set[Any]:
    return {device for sharding in _shardings((abstract_args, out_shardings)) for device in sharding.device_set}
