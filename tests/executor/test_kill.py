"""After a process is killed before any one of its writes, the next run on the prefix finishes."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simpo_pipeline.executor.executor import Executor
from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.step import ExecutorStep, take, this_output_path
from simpo_pipeline.storage.checksum import crc32c_of
from simpo_pipeline.storage.files import write_text
from simpo_pipeline.storage.paths import join

KILLED = 9


def publish(config: list[Any]) -> Live:
    write_text(join(config[0], "out.txt"), "first")
    return Live("value", digest="digest")


def use(config: list[Any]):
    write_text(join(config[0], "out.txt"), f"second with {config[1]}")


def run(prefix: str) -> Executor:
    first = ExecutorStep("first", publish, [this_output_path()])
    executor = Executor(prefix)
    executor.run([ExecutorStep("second", use, [this_output_path(), take(first)])])
    return executor


def run_and_die(prefix: str, last_write: int) -> None:
    """Run, and exit immediately instead of making write number `last_write`. Call this in a separate process."""
    writes = iter(range(1, last_write))

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*arguments: Any) -> Any:
            if next(writes, None) is None:
                os._exit(KILLED)
            return change(*arguments)

        return changing

    # Every file is created by one of the first two functions and removed by the third.
    os.replace, os.link, os.remove = counted(os.replace), counted(os.link), counted(os.remove)
    run(prefix)


def die_at_every_write(folder: str) -> None:
    """Run in forks that exit at write 1, at write 2, ... until a run finishes. Call this in a separate process.

    Prints the exit codes of the forks as JSON. The outputs of each fork are in a folder named after its write number.
    """
    codes = [KILLED]
    while codes[-1] == KILLED:
        point = len(codes)
        pid = os.fork()
        if not pid:
            try:
                run_and_die(join(folder, str(point)), point)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(codes[1:]))


def manifest_matches(output_path: Path) -> bool:
    files = json.loads((output_path / "manifest.json").read_text())["files"]
    listed = {file["path"]: file["crc32c"] for file in files}
    return listed == {"out.txt": crc32c_of(str(output_path / "out.txt"))}


def test_after_a_kill_at_any_write_the_next_run_finishes_with_complete_outputs(tmp_path: Path):
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_kill; test_kill.die_at_every_write(sys.argv[2])"
    words = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    codes = json.loads(done.stdout)
    assert codes == [KILLED] * (len(codes) - 1) + [0]
    assert len(codes) > 12
    for point in range(1, len(codes) + 1):
        prefix = tmp_path / str(point)
        for status in prefix.glob("*/.executor_status"):
            assert status.read_text() != "SUCCESS" or manifest_matches(status.parent)
        executor = run(str(prefix))
        paths = [Path(executor.output_paths[step]) for step in executor.steps]
        assert [(path / "out.txt").read_text() for path in paths] == ["first", "second with value"]
        assert [(path / ".executor_status").read_text() for path in paths] == ["SUCCESS", "SUCCESS"]
        assert all(manifest_matches(path) for path in paths)
