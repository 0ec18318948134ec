"""The machine that figures belong to, and how busy it is."""

import importlib.metadata
import os
import pathlib
import sys
from typing import Any

# Every contestant gets so many cores.
THREADS = 2


def machine() -> dict[str, Any]:
    """What the figures belong to."""
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
    """CPU seconds that this machine has worked or was kept from working, over all CPUs."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
