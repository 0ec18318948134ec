"""Device programs: compiled ahead under a name, fingerprinted, agreed on, and launched through the ledger.

A program that spans processes is compared across them before it is compiled: a difference is told in every process,
with the first line that differs. Everything that runs on a device in this package is a `Program`; after
`forbid_strays()` jax refuses to run anything else, so a stray eager operation raises on the host that wrote it before
it reaches a device. Nothing here knows what a program computes.
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
    """The compiler's own figures for one program, in bytes per device."""

    arguments: int
    outputs: int
    aliased: int
    temporary: int

    @property
    def peak(self) -> int:
        """Arguments, outputs and temporaries that live at once; donated buffers are counted once."""
        return self.arguments + self.outputs - self.aliased + self.temporary


@dataclasses.dataclass(frozen=True, eq=False)
class LoweredProgram:
    """A program as it goes to the compiler.

    Attributes:
        parts: All that makes the program what it is, by name.
        devices: What it runs on; empty where it runs on the default device.
        options: The compiler's, for this program only.
    """

    name: str
    lowered: jax.stages.Lowered
    parts: Mapping[str, str]
    devices: frozenset[Any]
    options: Mapping[str, bool | int]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the parts: equal in every process that compiles the same program for the same devices."""
        return hashlib.sha256("\0".join(self.parts.values()).encode()).hexdigest()

    @functools.cached_property
    def stablehlo_fingerprint(self) -> str:
        """SHA-256 (hex) of the program's text, which does not name devices."""
        return hashlib.sha256(self.parts["StableHLO"].encode()).hexdigest()

    def compile(self, **more_options: str | bool | int) -> jax.stages.Compiled:
        """The executable, with more options of the compiler where some are given."""
        options: dict[str, Any] = {**self.options, **more_options}
        return self.lowered.compile(options)

    @property
    def launch(self) -> Launch:
        """What the ledger records of it."""
        num_processes = len({device.process_index for device in self.devices})
        return Launch(self.name, self.fingerprint, max(1, len(self.devices)), max(1, num_processes))


class Program:
    """An XLA executable with a name. Calling it launches it and records the launch.

    Arguments must match the abstract arguments it was compiled for in tree structure, shape, dtype and sharding.
    """

    def __init__(self, launch: Launch, compiled: jax.stages.Compiled, before_launch: Callable[[Launch], None]):
        self.name = launch.program
        self.fingerprint = launch.fingerprint
        self._launch = launch
        self._compiled = compiled
        self._before_launch = before_launch

    @property
    def memory_bytes(self) -> MemoryBytes:
        """What the compiler says this program needs."""
        stats = self._compiled.memory_analysis()
        if stats is None:
            raise ProgramError(f"this backend states no memory figures for {self.name!r}; run on cpu, gpu or tpu")
        return MemoryBytes(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporary=stats.temp_size_in_bytes,
        )

    def as_text(self) -> str:
        """The optimized HLO, for people and tests that look for collectives in it."""
        return self._compiled.as_text() or ""

    def __call__(self, *args: Any) -> Any:
        self._before_launch(self._launch)
        # The one place where execution is allowed once strays are forbidden; the window is local to this thread.
        with jax.no_execution(False):
            return self._compiled(*args)


class Programs:
    """Compiles and keeps the programs of one job, and holds its ledger."""

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        check_launches: bool = False,
        cache: CompilationCache | None = None,
    ) -> None:
        """`cache` is the open compilation cache, if there is one.

        `check_launches` makes all processes meet before each launch of a program that spans them. Then a launch that
        the others do not make raises in every process, with its line, before it reaches a device; otherwise the monitor
        finds it a moment later. It costs some milliseconds a launch.
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
        """Compiles `function` ahead for the given abstract arguments.

        Args:
            name: What logs, ledger and errors call the program.
            function: A function of positional arguments, pytrees in and out.
            abstract_args: Pytrees of `jax.ShapeDtypeStruct`, with shardings where a mesh is used.
            donate_argnums: Arguments whose buffers the program may reuse; the caller's arrays are dead afterwards.
            out_shardings: As in `jax.jit`; None leaves the choice to the compiler.
            compiler_options: XLA's debug options by name, for this program only.

        A program that lowers to the same text for the same devices is compiled once and returned again.

        Raises:
            ProgramError: the program spans processes and is not the same in all.
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
            # A process whose compiler failed does not know what the others do; all compile it again.
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
        """Return what `build` returned for an equal key before; call it the first time.

        Tracing and lowering takes seconds, also where the executable is known. The key must hold all that the programs
        are made from, and every process must ask for equal keys in the same order.
        """
        if key not in self._built:
            self._built[key] = build()
        return self._built[key]

    def _compile_or_load_everywhere(
        self, group: ProcessGroup, lowered: LoweredProgram, lower: Callable[[], LoweredProgram], start: float
    ) -> jax.stages.Compiled:
        """Load a program in all processes, or compile it in all.

        XLA's CPU backend orders the collectives of an executable that it loads differently from those of one that it
        has just compiled. Gloo matches messages by their order alone: if both kinds meet, it aborts, or a process
        receives the wrong array.
        """
        if self._cache is None:
            # jax's own cache, if there is one, is written by process 0 only.
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
        logger.info("%s is compiled here too, since process %s did not find it", lowered.name, missing)
        # `lowered.compile()` would return the loaded executable again: jax keeps it for this lowering.
        again = lower()
        if again.fingerprint != lowered.fingerprint:
            raise ProgramError(
                f"program {lowered.name!r} is another one each time that it is traced; build it from "
                "nothing that changes"
            )
        with opened_cache(None):
            compiled = again.compile()
        logger.info("compiled %s in %.1f s (%s)", *_words_of(lowered, start))
        return compiled

    def _compile_or_load(self, lowered: LoweredProgram, start: float) -> tuple[jax.stages.Compiled, bool]:
        """Return the executable and whether it was loaded from the cache."""
        if self._cache is None:
            compiled, is_hit = lowered.compile(), False
        else:
            has_callbacks = "callback" in lowered.parts["StableHLO"]
            compiled, is_hit = self._cache.compile(lowered.name, lowered.compile, has_callbacks=has_callbacks)
        logger.info(
            "read compiled %s in %.1f s (%s)" if is_hit else "compiled %s in %.1f s (%s)", *_words_of(lowered, start)
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


def _words_of(lowered: LoweredProgram, start: float) -> tuple[str, float, str]:
    return lowered.name, time.perf_counter() - start, lowered.launch.fingerprint[:12]


def lower_program(
    name: str,
    function: Callable[..., Any],
    *abstract_args: Any,
    donate_argnums: Sequence[int] = (),
    out_shardings: Any = None,
    compiler_options: Mapping[str, bool | int] | None = None,
) -> LoweredProgram:
    """What `Programs.compile` compiles, of the same arguments; descriptions of devices do, too."""

    def program(*args: Any) -> Any:
        return function(*args)

    # Kernels carry the names of their source files into the text: with folders it would be another one on a host, or in
    # an environment, where they lie elsewhere.
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
    """Make sure that all processes are about to compile the same program. Return which of them know it already.

    Raises:
        ProgramError: in every process, naming the program, the processes, and the first line that differs.
    """
    gathered: list[tuple[list[str], bool]] = group.gather([[name, fingerprint], is_known])
    told = [theirs for theirs, _ in gathered]
    if all(theirs == told[0] for theirs in told):
        return [known for _, known in gathered]
    everyones: list[dict[str, str]] = group.gather({"name": name, **parts})
    other = next(index for index, theirs in enumerate(told) if theirs != told[0])
    others = [str(index) for index, theirs in enumerate(told) if theirs != told[0]]
    raise ProgramError(
        f"program {everyones[other]['name']!r} of process {', '.join(others)} is not program "
        f"{everyones[0]['name']!r} of process 0: {first_difference(everyones[0], everyones[other])}. Nothing was "
        "launched. Start every process with the same code, versions, flags and config, and build programs from nothing "
        "that differs between hosts."
    )


def agree_on_launch(group: ProcessGroup, launch: Launch) -> None:
    """Makes sure that all processes are about to launch the same program.

    Raises:
        ProgramError: in every process, naming what each would launch.
    """
    told: list[list[str]] = group.gather([launch.program, launch.fingerprint])
    if any(theirs != told[0] for theirs in told):
        names = "; ".join(
            f"process {index} would launch {program!r} ({fingerprint[:12]})"
            for index, (program, fingerprint) in enumerate(told)
        )
        raise ProgramError(
            f"{names}, at {call_site()}. Nothing was launched; all must launch the same programs in the same order."
        )


def first_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first line in which two programs differ, and which part of what makes a program it is in."""
    for part, text in ours.items():
        lines, other_lines = text.splitlines() or [""], theirs[part].splitlines() or [""]
        for number, (line, other) in enumerate(itertools.zip_longest(lines, other_lines, fillvalue="nothing"), 1):
            if line != other:
                return f"{part} differs at line {number}, {line.strip()!r} in process 0 and {other.strip()!r} there"
    return "they have different fingerprints"


def forbid_strays() -> None:
    """From now on jax raises for every execution that does not come from a `Program`, in all threads."""
    jax.config.update("jax_no_execution", True)


def allow_strays() -> None:
    """Undoes `forbid_strays`."""
    jax.config.update("jax_no_execution", False)


def _parts(stablehlo: str, abstract_args: Any, out_shardings: Any) -> dict[str, str]:
    """All that makes a program what it is, by name."""
    # Lowered text, not the compiled one: chip coordinates enter the compilation, so optimized HLO of the same
    # program differs between the hosts of a pod. StableHLO does not hold the devices, hence the shardings.
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
