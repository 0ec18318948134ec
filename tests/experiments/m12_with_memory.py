"""Run M12 on `tiny` and print the memory of the process and its devices after each step; see test_m12.py.

python tests/experiments/m12_with_memory.py [flags of m12_periodic.py]
"""

import pathlib

from experiments import interleave
from experiments.m12_periodic import PRESETS, periodic
from experiments.preset_flags import InterleaveFlags
from simpo_pipeline.executor.main import parse_main_config
from simpo_pipeline.job.main import TrackerChoice, main
from steps.train import train


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmRSS:"))) * 1024


def train_and_report_memory(config, run):
    """Run step `train`, then print a line about memory."""
    import jax

    live = train(config, run)
    on_devices = sum(array.nbytes for array in jax.live_arrays())
    print(f"MEMORY {config.stop_step} {resident_bytes()} {on_devices}", flush=True)
    return live


if __name__ == "__main__":
    flags = parse_main_config(InterleaveFlags)
    setattr(interleave, "train", train_and_report_memory)  # noqa: B010
    main(flags, steps=periodic(PRESETS["tiny"]), tracker=TrackerChoice("none"))
