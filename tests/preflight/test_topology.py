"""Names of slices, and what follows from the coordinates of their chips."""

import dataclasses

import pytest

from simpo_pipeline.errors import ConfigError
from simpo_pipeline.preflight.topology import (
    TOPOLOGIES,
    devices_by_host,
    farthest_hops,
    fewest_links,
    find_topology,
)


@dataclasses.dataclass(frozen=True)
class Described:
    id: int
    process_index: int
    coords: tuple[int, int, int]


def v5p_32() -> list[Described]:
    coordinates = [(x, y, z) for z in range(4) for y in range(2) for x in range(2)]
    return [Described(number, coords[2], coords) for number, coords in enumerate(coordinates)]


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "compiler_name"),
    [
        ("v5p-16", 8, 2, "v5p:2x2x2"),
        ("v5p-32", 16, 4, "v5p:2x2x4"),
        ("v5p-64", 32, 8, "v5p:2x4x4"),
        ("v5e-16", 16, 4, "v5e:4x4"),
        ("v6e-16", 16, 4, "v6e:4x4"),
    ],
)
def test_a_name_gives_its_chips_and_hosts(name, chips, hosts, compiler_name):
    topology = find_topology(name)
    assert (topology.num_chips, topology.num_hosts, topology.compiler_name) == (chips, hosts, compiler_name)


@pytest.mark.parametrize(
    ("name", "ends"), [("v5p-16", (0, 1)), ("v5p-64", (0, 7)), ("v5e-16", (1, 3)), ("v6e-16", (1, 3))]
)
def test_both_ends_are_hosts_that_the_compiler_accepts(name, ends):
    assert find_topology(name).end_hosts == ends


@pytest.mark.parametrize("name", ["v5p-31", "V5P-32", "v4-8", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError) as refused:
        find_topology(name)
    assert repr(name) in str(refused.value)
    assert all(known in str(refused.value) for known in TOPOLOGIES)


def test_devices_are_assigned_to_their_hosts_by_id():
    hosts = devices_by_host(v5p_32()[::-1])
    assert [[device.id for device in host] for host in hosts] == [list(range(n, n + 4)) for n in range(0, 16, 4)]


def test_links_and_hops_are_counted_within_the_given_devices():
    assert (fewest_links(v5p_32()), farthest_hops(v5p_32())) == (3, 5)
    host = devices_by_host(v5p_32())[0]
    assert (fewest_links(host), farthest_hops(host)) == (2, 2)
    assert (fewest_links(host[:1]), farthest_hops(host[:1])) == (1, 0)
