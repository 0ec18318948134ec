"""Program for test_race.py: 8 processes race for one step in each round, and some of them are killed.

python race.py PREFIX LOG_FOLDER ROUNDS SEED HOSTS

With HOSTS "one", all processes are on this machine, so that the death of a holder is detected immediately. With "many",
each process claims to be on a separate machine, so that the lease of a dead holder must expire. Prints the outcome of
each round as JSON.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from simpo_pipeline.errors import LeaseLostError
from simpo_pipeline.executor import Executor, ExecutorStep
from simpo_pipeline.executor.records import holder as holder_module
from simpo_pipeline.executor.records.lease import LeaseConfig
from simpo_pipeline.executor.records.status import find_outputs, manifest_bytes
from simpo_pipeline.storage.files import read_bytes, read_text
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.storage.paths import join

PROCESSES = 8
LEASE = LeaseConfig(heartbeat_seconds=0.25, expiry_seconds=1.0, poll_seconds=0.05)


def say(log: Path, word: str) -> None:
    """Append a line in one write, so that a kill cannot split or lose it."""
    with log.open("a") as file:
        file.write(f"{word} {os.getpid()}\n")


def work(config: list[Any], output: OutputFolder) -> None:
    """Log the start and end without any lock, and write two files that must come from one process."""
    log = Path(config[0])
    say(log, "begin")
    output.write_text("first.txt", str(os.getpid()))
    time.sleep(0.02 + 0.06 * random.random())
    output.write_text("second.txt", str(os.getpid()))
    say(log, "end")


def contend(prefix: str, log: Path, hosts: str) -> None:
    """Run one process of a round."""
    if hosts == "many":
        space = f"machine of {os.getpid()}"
        holder_module._pid_space = lambda: space
    executor = Executor(prefix, lease=LEASE)
    try:
        executor.run([ExecutorStep("shared", work, [str(log)])])
        say(log, f"done-{executor.results[0].action}")
    except LeaseLostError:  # a heartbeat was late because the machine is busy
        say(log, "lost")


def fork(prefix: str, log: Path, hosts: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        contend(prefix, log, hosts)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def race(prefix: str, log: Path, choose: random.Random, hosts: str) -> dict[str, Any]:
    """Run one round. Return its kills, starts, successful runs, lost leases and failures, and what is wrong."""
    pids = [fork(prefix, log, hosts) for _ in range(PROCESSES)]
    victims: set[int] = set()
    begun_first = choose.random() < 0.6
    while begun_first and not log.exists():
        time.sleep(0.002)  # so that the first process in the step may be killed; other rounds kill earlier
    for _ in range(choose.randrange(4)):
        time.sleep(choose.random() * 0.06)
        victims.add(kill_one(log, [pid for pid in pids if pid not in victims], choose))
    codes = {pid: os.waitpid(pid, 0)[1] for pid in pids}
    survivors = {pid: code for pid, code in codes.items() if pid not in victims}
    words = [line.split() for line in log.read_text().splitlines()]
    ran = [int(pid) for word, pid in words if word == "done-RUN"]
    return {
        "killed": sum(os.WIFSIGNALED(code) for code in codes.values()),
        "failed": [pid for pid, code in survivors.items() if code != 0],
        "ran": ran,
        "begun": sum(word == "begin" for word, _ in words),
        "lost": sum(word == "lost" for word, _ in words),
        "wrong": find_wrong(prefix, ran),
    }


def kill_one(log: Path, living: list[int], choose: random.Random) -> int:
    """Kill one process, preferably the one that is inside the step, and return its pid."""
    lines = log.read_text().splitlines() if log.exists() else []
    begun = int(lines[-1].split()[1]) if lines and lines[-1].startswith("begin") else None
    victim = begun if begun in living and choose.random() < 0.8 else choose.choice(living)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    return victim


def find_wrong(prefix: str, ran: list[int]) -> str | None:
    """Return what is wrong with the outputs at the end of a round, or None."""
    planned = Executor(prefix)
    step = ExecutorStep("shared", work, [""])
    planned.run([step], dry_run=True)
    path = planned.output_paths[step]
    first, second = read_text(join(path, "first.txt")), read_text(join(path, "second.txt"))
    if read_text(join(path, ".executor_status")) != "SUCCESS":
        return "no SUCCESS"
    if first != second or (ran and str(ran[0]) != first) or len(ran) > 1:
        return f"outputs of {first} and {second}, runs of {ran}"
    if read_bytes(join(path, "manifest.json")) != manifest_bytes(find_outputs(path)):
        return "the manifest does not match"
    return None


def main() -> None:
    """Run all rounds, each in a child process, because a process that used the network should not fork."""
    prefix, logs, rounds, seed, hosts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    if prefix.startswith("gs://"):
        importlib.import_module("gcsfs")  # once, not in each child, because it takes a second
    choose = random.Random(seed)
    seen: list[dict[str, Any]] = []
    for number in range(rounds):
        report = logs / f"{number}.json"
        round_seed = choose.random()
        if os.fork() == 0:
            outcome = race(f"{prefix}/{number}", logs / f"{number}.log", random.Random(round_seed), hosts)
            report.write_text(json.dumps(outcome))
            os._exit(0)
        os.wait()
        seen.append(json.loads(report.read_text()))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
