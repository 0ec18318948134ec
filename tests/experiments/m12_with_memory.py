"""M12 itself, `tiny`, which says after each step what the process and its devices hold; see test_m12.py.

python tests/experiments/m12_with_memory.py [flags of m12_periodic.py]
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))
m12 = importlib.import_module("m12_periodic")
interleave = importlib.import_module("steps.interleave")

from simpo_pipeline.executor.main import executor_main, parse_main_config  # noqa: E402
from simpo_pipeline.tracking.tracker import NoTracker  # noqa: E402
from steps.joined_job import joined_job  # noqa: E402
from steps.train import train  # noqa: E402


def resident_bytes() -> int:
    """What the process holds of the machine's memory."""
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmRSS:"))) * 1024


def telling(config, run):
    """Step `train`, and a line about memory when it is done."""
    import jax

    live = train(config, run)
    on_devices = sum(array.nbytes for array in jax.live_arrays())
    print(f"MEMORY {config.stop_step} {resident_bytes()} {on_devices}", flush=True)
    return live


if __name__ == "__main__":
    args = parse_main_config(m12.M12Args)
    setattr(interleave, "train", telling)  # noqa: B010
    with joined_job(args) as job:
        session = args.job_session(NoTracker, job.group)
        executor_main(args, steps=m12.periodic(m12.PRESETS["tiny"]), session=session, processes=job.processes)
