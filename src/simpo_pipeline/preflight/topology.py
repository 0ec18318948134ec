"""The slices that a preflight supports: chips, hosts and chip specifications by topology name.

Names are those of `--tpu_type`. For v5p, the number in the name counts TensorCores, two per chip; for the others, it
counts chips. Planning imports this module to check a flag, so jax is imported only when devices are requested.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from simpo_pipeline.errors import ConfigError

V5P_PAGE = "docs.cloud.google.com/tpu/docs/v5p, key specifications"
V5E_PAGE = "docs.cloud.google.com/tpu/docs/v5e, key specifications"
V6E_PAGE = "docs.cloud.google.com/tpu/docs/v6e, key specifications"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Specification of one chip, as published by its maker.

    Attributes:
        hbm_bytes: HBM capacity.
        peak_flops: bfloat16 floating-point operations per second; a multiply-add counts as two.
        hbm_bytes_per_second: HBM bandwidth.
        link_bytes_per_second: Bandwidth of each link to a neighbor in one direction: the bidirectional figure of the
            page, halved and divided by the number of links.
        clock_hz: Clock rate in which the compiler counts cycles: peak divided by multiply-adds per cycle.
        source: The page with these figures.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    clock_hz: float
    source: str


# The page states 95 GiB. The runtime reserves a part that no page documents, so 95 * 10**9 bytes are assumed.
V5P = Chip("v5p", 95 * 10**9, 459e12, 2765e9, 1200e9 / 2 / 6, 1.75e9, V5P_PAGE)
V5E = Chip("v5e", 16 * 10**9, 197e12, 819e9, 400e9 / 2 / 4, 1.5e9, V5E_PAGE)
V6E = Chip("v6e", 32 * 10**9, 918e12, 1638e9, 800e9 / 2 / 4, 1.75e9, V6E_PAGE)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice with `shape` chips along the axes of the interconnect and four chips per host."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Number of chips of the slice."""
        return math.prod(self.shape)

    @property
    def num_hosts(self) -> int:
        """Number of hosts, which is the number of processes of a job."""
        return self.num_chips // 4

    @property
    def end_hosts(self) -> tuple[int, int]:
        """The first and the last host, which represent all hosts because their programs are the same.

        On a slice with two axes, the second host replaces the first. libtpu 0.0.42 refuses every collective among the
        chips 0, 1, 4 and 5 of a 4x4 slice ("Unexpected device_id 4") but accepts those of the other hosts.
        """
        return int(len(self.shape) == 2), self.num_hosts - 1

    @property
    def compiler_name(self) -> str:
        """The name that libtpu uses for the topology."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        Topology("v5p-16", V5P, (2, 2, 2)),
        Topology("v5p-32", V5P, (2, 2, 4)),
        Topology("v5p-64", V5P, (2, 4, 4)),
        Topology("v5e-16", V5E, (4, 4)),
        Topology("v6e-16", V6E, (4, 4)),
    )
}


def find_topology(name: str) -> Topology:
    """Return the topology with a given name.

    Raises:
        ConfigError: no topology has that name.
    """
    if name not in TOPOLOGIES:
        raise ConfigError(
            f"--preflight {name!r} is not a known topology; give one of {', '.join(TOPOLOGIES)}, named as in "
            "--tpu_type, or add it to simpo_pipeline/preflight/topology.py"
        )
    return TOPOLOGIES[name]


def describe_devices(topology: Topology) -> list[Any]:
    """Return descriptions of a topology's devices. Programs can be compiled for them but not run on them.

    Raises:
        ConfigError: the TPU compiler is not installed.
    """
    # Otherwise libtpu queries the machine's metadata and refuses to load while another process has it loaded, and jax
    # looks for TPUs because it finds libtpu.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("JAX_PLATFORMS", "cpu")):
        os.environ.setdefault(name, value)
    # Imported here because planning must not import jax.
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(topology_name=topology.compiler_name, platform="tpu")
    except Exception as error:  # jax raises whatever the plugin or its absence raises
        raise ConfigError(
            f"the TPU compiler cannot describe {topology.name} ({topology.compiler_name}): {error}. It comes with "
            "the extra `tpu`: uv run --isolated --extra tpu python ..."
        ) from error
    return list(description.devices)


def devices_by_host(devices: Sequence[Any]) -> list[list[Any]]:
    """Return the devices of each host, ordered by id, as jax lists them on that host."""
    by_host: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        by_host.setdefault(device.process_index, []).append(device)
    return [by_host[host] for host in sorted(by_host)]


def fewest_links(devices: Sequence[Any]) -> int:
    """Return the fewest links that any chip has to the others. Slices of this size have no wraparound links."""
    positions = {tuple(device.coords) for device in devices}
    if len(positions) < 2:
        return 1

    def links(position: tuple[int, ...]) -> int:
        return sum(
            tuple(at + step * (axis == moved) for axis, at in enumerate(position)) in positions
            for moved in range(len(position))
            for step in (-1, 1)
        )

    return max(1, min(map(links, positions)))


def farthest_hops(devices: Sequence[Any]) -> int:
    """Return the number of links between the two chips that are farthest apart."""
    positions = [device.coords for device in devices]
    return sum(max(along) - min(along) for along in zip(*positions, strict=True))
