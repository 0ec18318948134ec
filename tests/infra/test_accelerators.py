"""TPU types: chips, hosts and topologies as in Google Cloud's tables."""

import pytest

from launcher.accelerators import parse_tpu_type
from launcher.errors import BadUsage
from launcher.options import derived_run_id


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "topology", "runtime"),
    [
        ("v3-32", 16, 4, "4x4", "tpu-ubuntu2204-base"),
        ("v4-8", 4, 1, "2x2x1", "tpu-ubuntu2204-base"),
        ("v4-32", 16, 4, "2x2x4", "tpu-ubuntu2204-base"),
        ("v5litepod-1", 1, 1, "1x1", "v2-alpha-tpuv5-lite"),
        ("v5litepod-8", 8, 1, "2x4", "v2-alpha-tpuv5-lite"),
        ("v5e-16", 16, 4, "4x4", "v2-alpha-tpuv5-lite"),
        ("v5p-8", 4, 1, "2x2x1", "v2-alpha-tpuv5"),
        ("v5p-16", 8, 2, "2x2x2", "v2-alpha-tpuv5"),
        ("v5p-32", 16, 4, "2x2x4", "v2-alpha-tpuv5"),
        ("v5p-64", 32, 8, "2x4x4", "v2-alpha-tpuv5"),
        ("v5p-256", 128, 32, "4x4x8", "v2-alpha-tpuv5"),
        ("v6e-32", 32, 8, "4x8", "v2-alpha-tpuv6e"),
        ("v6e-256", 256, 64, "16x16", "v2-alpha-tpuv6e"),
    ],
)
def test_chips_hosts_topology_and_image_of_a_type(name, chips, hosts, topology, runtime):
    found = parse_tpu_type(name)
    assert (found.chips, found.hosts, found.topology) == (chips, hosts, topology)
    assert found.generation.runtime_version == runtime


@pytest.mark.parametrize("name", ["v5p", "v5p-", "v5p-0", "v5p-1", "v5p-24", "v7-8", "V5P-8", "v6e-3"])
def test_an_invalid_type_is_refused(name):
    with pytest.raises(BadUsage):
        parse_tpu_type(name)


def test_a_run_id_is_the_same_for_the_same_words_only():
    words = ("python", "experiments/m11_interleave.py", "--prefix", "gs://b/p")
    assert derived_run_id(words) == derived_run_id(words)
    assert derived_run_id(words).startswith("m11-interleave-")
    assert derived_run_id((*words, "x")) != derived_run_id(words) != derived_run_id(words[:-1])
    assert derived_run_id(("12 monkeys",)).startswith("job-12-monkeys-")
