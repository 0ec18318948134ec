"""M11 itself, `tiny`, with a fault planted in one process; see test_m11_many_hosts.py.

    python tests/experiments/m11_with_fault.py FAULT STEP VICTIM [flags of m11_interleave.py]

FAULT is raise, hang, kill or freeze; STEP is train (before update 4) or infer (at the second round of the engine).
"""

import os
import signal
import sys
import time
from typing import NoReturn

from experiments.m11_interleave import PRESETS, interleave
from experiments.preset_flags import PresetFlags
from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.rows import RowBatch
from simpo_pipeline.executor.main import parse_main_config
from simpo_pipeline.inference.scheduler import Scheduler
from simpo_pipeline.job.main import TrackerChoice, main


def happen(fault: str) -> NoReturn:
    """Says that the fault comes now, and lets it."""
    print(f"FAULT {time.time():.3f} {fault}", flush=True)
    if fault == "raise":
        raise FloatingPointError("a planted error")
    if fault != "hang":
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[fault])
    while True:
        time.sleep(1)


def plant(fault: str, step: str) -> None:
    """Puts the fault where training takes its batch, or where the engine takes its next round."""
    batch, next_round = PairLoader.batch, Scheduler.next_round
    rounds: list[int] = []

    def faulty_batch(self: PairLoader, step: int) -> RowBatch:
        return happen(fault) if step == 3 else batch(self, step)

    def faulty_round(self):
        rounds.append(1)
        return happen(fault) if len(rounds) == 2 else next_round(self)

    if step == "train":
        PairLoader.batch = faulty_batch
    else:
        Scheduler.next_round = faulty_round


if __name__ == "__main__":
    fault, step, victim = sys.argv[1:4]
    del sys.argv[1:4]
    if os.environ["JAX_PROCESS_ID"] == victim:
        plant(fault, step)
    flags = parse_main_config(PresetFlags)
    main(flags, steps=interleave(PRESETS["tiny"], flags), tracker=TrackerChoice("none"))
