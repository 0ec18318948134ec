"""The machine on which figures are measured, and its load."""

import importlib.metadata
import os
import pathlib
import sys
from typing import Any

# Number of cores of every contestant.
THREADS = 2


def machine() -> dict[str, Any]:
    """Return a description of the machine and of the software versions."""
    cpu = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(":")[2].strip() for line in cpu if line.startswith("model name"))
    flags = next(line for line in cpu if line.startswith("flags")).split()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "instructions": sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}.intersection(flags)),
        "load average": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "jax": importlib.metadata.version("jax"),
    }


def busy_seconds() -> float:
    """Return the CPU seconds that this machine was busy or had stolen by its hypervisor, summed over all CPUs."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
