"""Device programs: compiled ahead under a name, fingerprinted, and launched through the ledger.

Nothing here knows what a program computes. Everything that runs on a device in this package is a `Program`; after
`forbid_strays()` jax refuses to run anything else, so a stray eager operation raises on the host that wrote it before
it reaches a device.
"""

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from simpo_pipeline.distributed.ledger import Launch, Ledger
from simpo_pipeline.errors import ProgramError

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


class Program:
    """An XLA executable with a name. Calling it launches it and records the launch.

    Arguments must match the abstract arguments it was compiled for in tree structure, shape, dtype and sharding.
    """

    def __init__(self, name: str, compiled: jax.stages.Compiled, fingerprint: str, num_devices: int, ledger: Ledger):
        self.name = name
        self.fingerprint = fingerprint
        self._compiled = compiled
        self._launch = Launch(program=name, fingerprint=fingerprint, num_devices=num_devices)
        self._ledger = ledger

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

    def __call__(self, *args: Any) -> Any:
        self._ledger.record(self._launch)
        # The one place where execution is allowed once strays are forbidden; the window is local to this thread.
        with jax.no_execution(False):
            return self._compiled(*args)


class Programs:
    """Compiles and keeps the programs of one job, and holds its ledger."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._by_fingerprint: dict[tuple[str, str], Program] = {}

    def compile(
        self,
        name: str,
        function: Callable[..., Any],
        *abstract_args: Any,
        donate_argnums: Sequence[int] = (),
        out_shardings: Any = None,
    ) -> Program:
        """Compiles `function` ahead for the given abstract arguments.

        Args:
            name: What logs, ledger and errors call the program.
            function: A function of positional arguments, pytrees in and out.
            abstract_args: Pytrees of `jax.ShapeDtypeStruct`, with shardings where a mesh is used.
            donate_argnums: Arguments whose buffers the program may reuse; the caller's arrays are dead afterwards.
            out_shardings: As in `jax.jit`; None leaves the choice to the compiler.

        A program that lowers to the same text for the same devices is compiled once and returned again.
        """

        def program(*args: Any) -> Any:
            return function(*args)

        program.__name__ = program.__qualname__ = name
        jitted = jax.jit(program, donate_argnums=tuple(donate_argnums), out_shardings=out_shardings)
        start = time.perf_counter()
        lowered = jitted.lower(*abstract_args)
        devices = _devices_of(abstract_args, out_shardings)
        fingerprint = _fingerprint(lowered.as_text(), abstract_args, out_shardings)
        known = self._by_fingerprint.get((name, fingerprint))
        if known is not None:
            return known
        compiled = lowered.compile()
        logger.info("compiled %s in %.1f s (%s)", name, time.perf_counter() - start, fingerprint[:12])
        made = Program(name, compiled, fingerprint, max(1, len(devices)), self.ledger)
        self._by_fingerprint[name, fingerprint] = made
        return made


def forbid_strays() -> None:
    """From now on jax raises for every execution that does not come from a `Program`, in all threads."""
    jax.config.update("jax_no_execution", True)


def allow_strays() -> None:
    """Undoes `forbid_strays`."""
    jax.config.update("jax_no_execution", False)


def _fingerprint(stablehlo: str, abstract_args: Any, out_shardings: Any) -> str:
    # Lowered text, not the compiled one: chip coordinates enter the compilation, so optimized HLO of the same
    # program differs between the hosts of a pod. StableHLO does not hold the devices, hence the shardings.
    parts = (
        stablehlo,
        jax.__version__,
        importlib.metadata.version("jaxlib"),
        os.environ.get("XLA_FLAGS", ""),
        os.environ.get("LIBTPU_INIT_ARGS", ""),
        *(_describe(sharding) for sharding in _shardings((abstract_args, out_shardings))),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


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
