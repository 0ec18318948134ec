"""No trainer state is written between train-2 and train-5: every byte is accounted for.

There are two independent counts: an audit hook lists every file that Python opens for writing, and the kernel's own
count of bytes written by this process (`/proc/self/io`) also covers native code.
"""

import dataclasses
import importlib.util
import os
import pathlib
import sys

import jax
import pytest

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.job.session import JobSession

ROOT = pathlib.Path(__file__).resolve().parents[2]
WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class WriteWatch:
    """List of the files opened for writing, and count of the bytes written, while it is on."""

    def __init__(self):
        self.on = False
        self.opened: set[str] = set()
        self.num_bytes = 0
        sys.addaudithook(self._audit)

    def _audit(self, event, arguments):
        if self.on and event == "os.rename":
            # A file that is written elsewhere and then moved counts at its final path.
            self.opened.add(os.fsdecode(arguments[1]))
        elif self.on and event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & WRITING_FLAGS
            if writes and isinstance(path, str | bytes):
                self.opened.add(os.fsdecode(path))

    def start(self):
        self.on, self.num_bytes = True, written_bytes()

    def stop(self):
        self.on, self.num_bytes = False, written_bytes() - self.num_bytes


def written_bytes() -> int:
    fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def load_experiment(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="needs Linux's count of written bytes")
def test_nothing_of_the_trainer_is_written_between_train_2_and_train_5(tmp_path):
    m11 = load_experiment("m11_interleave")
    watch, sizes = WriteWatch(), {}

    def watched(step):
        def function(config, run):
            if step.name == "train-5":
                watch.stop()
            result = step.fn(config, run)
            if step.name == "train-2":
                sizes["state"] = sum(leaf.nbytes for leaf in jax.tree.leaves(result.value.state))
                watch.start()
            return result

        return function

    steps = m11.interleave(m11.PRESETS["tiny"])
    train_2, infer, train_5 = steps[2:5]
    # The wrapped steps replace the originals in place, so that live edges keep pointing at them.
    for step in (train_2, train_5):
        object.__setattr__(step, "fn", watched(dataclasses.replace(step)))
    session = JobSession(compilation_cache="off")
    executor = Executor(prefix=str(tmp_path), session=session)
    try:
        executor.run(steps)
    finally:
        session.close(None)

    infer_folder = executor.output_paths[infer]
    allowed = {infer_folder, executor.output_paths[train_2], executor.output_paths[train_5]}
    own, strange = set(), set()
    for path in watch.opened:
        inside_infer = path.startswith(infer_folder + os.sep)
        status_file = os.path.dirname(path) in allowed and os.path.basename(path).lstrip(".").startswith(
            ("executor_", "manifest.json")
        )
        (own if inside_infer or status_file or path == os.devnull else strange).add(path)
    assert own, "the hook saw nothing, so it proves nothing"
    written = {path: os.path.getsize(path) for path in strange if os.path.isfile(path)}
    print(f"bytes written besides infer's outputs and status files: {sum(written.values())} {sorted(strange)}")
    assert sum(written.values()) == 0, written
    # The bytes beyond infer's files (status files, log lines) are far fewer than those of a train state.
    infer_bytes = sum(os.path.getsize(os.path.join(infer_folder, name)) for name in os.listdir(infer_folder))
    # Its host's rows were written twice: as requests finished, and again in order.
    infer_bytes += os.path.getsize(os.path.join(infer_folder, "host_0000_of_0001.jsonl"))
    assert watch.num_bytes - infer_bytes < sizes["state"] / 20, (watch.num_bytes, infer_bytes, sizes)
