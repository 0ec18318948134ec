"""The engines that `inference.py` compares, and the process that each one runs in (see peers/protocol.py)."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from inference_files import environment, gguf_file
from inference_workloads import Workload
from machine import THREADS, busy_seconds

HERE = pathlib.Path(__file__).resolve().parent
# Kind -> environment and script.
PEERS: Mapping[str, tuple[str, str]] = {
    "transformers": ("transformers", "transformers_generate.py"),
    "llama.cpp": ("llamacpp", "llamacpp_batch.py"),
    "levanter": ("levanter", "levanter_engine.py"),
}
OURS = "ours"
# ggml's type ids for the key/value cache.
GGML_F32, GGML_F16 = 0, 1


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        kind: `OURS` or a key of `PEERS`.
        name: Its name in the table.
        batch: Number of sequences that it decodes together.
        settings: Settings of its process in addition to the common ones.
        num_warm_ups: Number of calls until it has compiled everything.
    """

    kind: str
    name: str
    dtype: str
    batch: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_warm_ups: int = 1

    @property
    def label(self) -> str:
        """Label that is unique among the contestants of a workload."""
        return f"{self.name}, {self.dtype}, batch {self.batch}"

    def command(self) -> list[str]:
        """Return the command without the settings, after filling the environment if necessary."""
        if self.kind == OURS:
            return [sys.executable, str(HERE / "inference_ours.py")]
        name, script = PEERS[self.kind]
        # -E: do not inherit additions to the caller's own path.
        return [str(environment(name)), "-E", str(HERE / "peers" / script)]


def contestants(workload_name: str, num_prompts: int, peers: Sequence[str]) -> list[Contestant]:
    """Return the contestants of a workload, ours first, at every batch size at which they are strong."""
    if workload_name == "C":
        entries = [
            Contestant(OURS, "ours", "float32", 32),
            Contestant("levanter", "Levanter", "float32", 32, {"sorts": True}, 3),
            Contestant("levanter", "Levanter without its sorts", "float32", 32, {"sorts": False}, 3),
        ]
    else:
        llama, half_cache, full_cache = "llama.cpp", {"kv_type": GGML_F16}, {"kv_type": GGML_F32}
        entries = [
            Contestant(OURS, "ours", "float32", 128),
            Contestant(OURS, "ours", "bfloat16", 128),
            Contestant("transformers", "transformers generate", "float32", 32),
            Contestant("transformers", "transformers generate", "float32", 128),
            Contestant("transformers", "transformers generate", "bfloat16", 128),
            # Keys and values are float16 by default, whatever the dtype of the weights.
            Contestant(llama, "llama.cpp", "float32", 32, half_cache),
            Contestant(llama, "llama.cpp", "float32", 128, half_cache),
            Contestant(llama, "llama.cpp, fp32 cache", "float32", 32, full_cache),
            Contestant(llama, "llama.cpp", "bfloat16", 32, half_cache),
            Contestant(llama, "llama.cpp", "bfloat16", 128, half_cache),
        ]
    fitting = [dataclasses.replace(entry, batch=min(entry.batch, num_prompts)) for entry in entries]
    entered = [entry for entry in fitting if entry.kind in (OURS, *peers)]
    # Batch sizes above the number of prompts become equal; keep one of them.
    return list({entry.label: entry for entry in entered}.values())


class Process:
    """Running contestant for one workload, from its start to `close`."""

    def __init__(
        self, contestant: Contestant, prompts: list[list[int]], max_tokens: int, model: pathlib.Path, log: TextIO
    ) -> None:
        """Start the process and wait until it is ready; its output goes to `log`."""
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": contestant.dtype,
            "batch": contestant.batch,
            "max_seq_len": max(map(len, prompts)) + max_tokens,
            "prompt_tokens": sum(map(len, prompts)),
            "threads": THREADS,
            **contestant.settings,
        }
        if contestant.kind == "llama.cpp":
            settings["gguf"] = str(gguf_file(contestant.dtype))
        self.contestant = contestant
        self._log = log.name
        command = [*contestant.command(), json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
        )
        try:
            self.versions: dict[str, str] = self._read()["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Make one call; return its answer and how many CPUs were meanwhile busy with other processes or stolen."""
        assert self._process.stdin is not None
        busy, own, start = busy_seconds(), self._cpu_seconds(), time.perf_counter()
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        answer = self._read()
        seconds = time.perf_counter() - start
        others = busy_seconds() - busy - (self._cpu_seconds() - own)
        return answer | {"others_cpus": max(others, 0.0) / seconds}

    def close(self) -> None:
        """Close its input, upon which it exits."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contestant.label} ended with {self._process.wait()}; see {self._log}")
        return json.loads(line)

    def _cpu_seconds(self) -> float:
        stat = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text()
        # The name before the last parenthesis may contain spaces.
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run_in_turn(
    entries: Sequence[Contestant],
    prompts: list[list[int]],
    workload: Workload,
    num_rounds: int,
    model: pathlib.Path,
    logs: pathlib.Path,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, str]]]:
    """Return the answers of each contestant by label, one per round, and the versions of each kind, without warm-ups.

    All processes are started first; while one works, the others wait for input.
    """
    logs.mkdir(parents=True, exist_ok=True)
    answers: dict[str, list[dict[str, Any]]] = {entry.label: [] for entry in entries}
    versions: dict[str, dict[str, str]] = {}
    running: list[Process] = []
    try:
        for entry in entries:
            with (logs / f"{entry.label}.log".replace(" ", "_")).open("w") as log:
                running.append(Process(entry, prompts, workload.max_tokens, model, log))
            versions[entry.kind] = running[-1].versions
            for _ in range(entry.num_warm_ups):
                _report("warm-up", entry, running[-1].ask(prompts, workload.max_tokens))
        for round_number in range(num_rounds):
            for process in running:
                answer = process.ask(prompts, workload.max_tokens)
                _report(f"round {round_number + 1}", process.contestant, answer)
                answers[process.contestant.label].append(answer)
    finally:
        for process in running:
            process.close()
    return answers, versions


def _report(what: str, contestant: Contestant, answer: Mapping[str, Any]) -> None:
    rate = answer["generated_tokens"] / answer["seconds"]
    others = f"others kept {answer['others_cpus']:.2f} CPUs busy"
    print(f"{what}: {contestant.label}: {answer['seconds']:.1f} s, {rate:.0f} tok/s; {others}", file=sys.stderr)
