"""The slices that a job can be checked for: name -> chips, hosts, and what the maker says a chip can do.

Names are those of `--tpu_type`. Of a v5p the number counts TensorCores, two a chip; of the others chips. Planning
imports this module to check a flag, so jax is imported only when devices are asked for.
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
    """One chip, as its maker specifies it.

    Attributes:
        hbm_bytes: Capacity of its HBM.
        peak_flops: bfloat16 floating-point operations per second, a multiply-add being two.
        hbm_bytes_per_second: Bandwidth of its HBM.
        link_bytes_per_second: Of each of its links to a neighbour, in one direction: the bidirectional figure of the
            page, halved and divided among the links.
        clock_hz: In which the compiler counts cycles: peak over multiply-adds a cycle.
        source: The page that says so.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    clock_hz: float
    source: str


# The page says 95 GiB; the runtime takes a part that no page states, so 95 * 10**9 bytes are counted on.
V5P = Chip("v5p", 95 * 10**9, 459e12, 2765e9, 1200e9 / 2 / 6, 1.75e9, V5P_PAGE)
V5E = Chip("v5e", 16 * 10**9, 197e12, 819e9, 400e9 / 2 / 4, 1.5e9, V5E_PAGE)
V6E = Chip("v6e", 32 * 10**9, 918e12, 1638e9, 800e9 / 2 / 4, 1.75e9, V6E_PAGE)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: `shape` chips along each axis of the interconnect, four chips a host."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def num_hosts(self) -> int:
        """Hosts, that is processes of a job."""
        return self.num_chips // 4

    @property
    def end_hosts(self) -> tuple[int, int]:
        """Two hosts that stand for all, for their programs are the same: the first and the last.

        Of a plane of chips the second stands for the first: libtpu 0.0.42 refuses every collective among the chips 0,
        1, 4 and 5 of a 4x4 slice ("Unexpected device_id 4"), and takes those of the other hosts.
        """
        return int(len(self.shape) == 2), self.num_hosts - 1

    @property
    def compiler_name(self) -> str:
        """What libtpu calls it."""
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
    """The topology of a name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TOPOLOGIES:
        raise ConfigError(
            f"--preflight {name!r} is no topology that is known here; give one of {', '.join(TOPOLOGIES)}, named as in "
            "--tpu_type, or add it to simpo_pipeline/preflight/topology.py"
        )
    return TOPOLOGIES[name]


def describe_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, as descriptions that programs can be compiled for but not run on.

    Raises:
        ConfigError: the compiler for TPUs is not installed.
    """
    # Else libtpu looks for the machine's metadata, and refuses to be loaded beside another process that has it; and
    # jax, finding libtpu, would look for TPUs.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"), ("JAX_PLATFORMS", "cpu")):
        os.environ.setdefault(name, value)
    # Imported here because planning must not import jax.
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(topology_name=topology.compiler_name, platform="tpu")
    except Exception as error:  # jax raises whatever the plugin or its absence raises
        raise ConfigError(
            f"the compiler for TPUs cannot describe {topology.name} ({topology.compiler_name}): {error}. It comes with "
            "the extra `tpu`: uv run --isolated --extra tpu python ..."
        ) from error
    return list(description.devices)


def devices_by_host(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices of each host, by id, as jax lists them there."""
    by_host: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        by_host.setdefault(device.process_index, []).append(device)
    return [by_host[host] for host in sorted(by_host)]


def fewest_links(devices: Sequence[Any]) -> int:
    """Links that the chip with the fewest has to others of these; slices of this size have none around the ends."""
    places = {tuple(device.coords) for device in devices}
    if len(places) < 2:
        return 1

    def links(place: tuple[int, ...]) -> int:
        return sum(
            tuple(at + step * (axis == moved) for axis, at in enumerate(place)) in places
            for moved in range(len(place))
            for step in (-1, 1)
        )

    return max(1, min(map(links, places)))


def farthest_hops(devices: Sequence[Any]) -> int:
    """Links between the two chips that are farthest from each other."""
    places = [device.coords for device in devices]
    return sum(max(along) - min(along) for along in zip(*places, strict=True))
