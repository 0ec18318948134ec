"""Run M11 on `tiny` with a fault injected into one process; see test_m11_many_hosts.py.

    python tests/experiments/m11_with_fault.py FAULT STEP VICTIM [flags of m11_interleave.py]

FAULT is raise, hang, kill or freeze; STEP is train (before update 4) or infer (at the second round of the engine).
"""

import os
import signal
import sys
import time
from typing import NoReturn

from experiments.m11_interleave import PRESETS, interleave
from experiments.preset_flags import InterleaveFlags
from simpo_pipeline.data.loader import PairLoader
from simpo_pipeline.data.rows import RowBatch
from simpo_pipeline.executor.main import parse_main_config
from simpo_pipeline.inference.scheduler import Scheduler
from simpo_pipeline.job.main import TrackerChoice, main


def cause(fault: str) -> NoReturn:
    """Print the time of the fault, then cause it."""
    print(f"FAULT {time.time():.3f} {fault}", flush=True)
    if fault == "raise":
        raise FloatingPointError("a planted error")
    if fault != "hang":
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[fault])
    while True:
        time.sleep(1)


def inject(fault: str, step: str) -> None:
    """Inject the fault where training gets its batch or where the engine gets its next round."""
    batch, next_round = PairLoader.batch, Scheduler.next_round
    rounds: list[int] = []

    def faulty_batch(self: PairLoader, step: int) -> RowBatch:
        return cause(fault) if step == 3 else batch(self, step)

    def faulty_round(self):
        rounds.append(1)
        return cause(fault) if len(rounds) == 2 else next_round(self)

    if step == "train":
        PairLoader.batch = faulty_batch
    else:
        Scheduler.next_round = faulty_round


if __name__ == "__main__":
    fault, step, victim = sys.argv[1:4]
    del sys.argv[1:4]
    if os.environ["JAX_PROCESS_ID"] == victim:
        inject(fault, step)
    flags = parse_main_config(InterleaveFlags)
    main(flags, steps=interleave(PRESETS["tiny"], flags), tracker=TrackerChoice("none"))
