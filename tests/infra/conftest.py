"""A fake cloud: `gcloud`, `docker` and `kubectl` are programs on PATH that record all events in one file."""

import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from launcher.application import LaunchEnvironment, main
from launcher.console import Console
from launcher.options import PollTiming

FAKES = pathlib.Path(__file__).parent / "fakes"
# Without any site-packages, even those of the virtual environment, a program starts twice as fast.
PROGRAM = """#!{python} -SE
import sys
sys.path.insert(0, {fakes!r})
from {name} import main
main(sys.argv[1:])
"""
JOB = ("--", "python", "experiments/m11.py", "--prefix", "gs://bucket/path")


class FastClock:
    """A clock that advances only by waiting, and raises a Ctrl-C while the launcher waits."""

    def __init__(self, is_interrupted: Callable[[], bool]) -> None:
        self._now = 0.0
        self._is_interrupted = is_interrupted
        self._lock = threading.Lock()

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds
        if threading.current_thread() is threading.main_thread() and self._is_interrupted():
            raise KeyboardInterrupt

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.sleep(seconds)
        return event.wait(0.002)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a launcher call."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.splitlines()[-1] if self.out else ""

    def host_lines(self, host: int) -> list[str]:
        """Return the lines that one host printed."""
        mark = f"[host {host}] "
        return [line.removeprefix(mark) for line in self.out.splitlines() if line.startswith(mark)]


class Cloud:
    """The fake cloud, and a launcher that uses it."""

    run_id = "m11-641778c9"
    """Name that the launcher gives to the job of `launch`."""
    finished = "Job finished with no error."
    where = ("--tpu_name", "m11", "--zone", "us-central1-a", "--project", "proj")

    def __init__(self, folder: pathlib.Path, root: pathlib.Path, read: Callable[[], tuple[str, str]]) -> None:
        self.folder = folder
        self.root = root
        self._read = read
        self.answers: list[str | type[BaseException]] = []
        self.questions: list[str] = []
        self.interrupt_when: Callable[[dict[str, Any]], bool] | None = None
        self.timing = PollTiming(poll=1.0, tick=0.05, start=30.0, reach=10.0, grace=20.0, preemption_notice=5.0)
        self.write(
            {"plan": {}, "calls": [], "built": [], "pushed": [], "started": [], "deleted": 0, "made": 0, "steps": []}
            | {
                "request": None,
                "node": None,
                "wanted": "v5p-16",
                "jobset": None,
                "secret": None,
                "attempt": 0,
                "looks": 0,
            }
            | {"read": []}
        )

    @property
    def state(self) -> dict[str, Any]:
        return ast.literal_eval((self.folder / "state").read_text())

    def write(self, state: dict[str, Any]) -> None:
        new = self.folder / "state.new"
        new.write_text(repr(state))
        new.replace(self.folder / "state")

    def plan(self, **plan: Any) -> None:
        """Set the events that happen from now on."""
        self.write(self.state | {"plan": plan})

    def has_tpu(self, state: str = "READY", kind: str = "v5p-16", request: str | None = "ACTIVE", **node: Any) -> None:
        """Create a TPU that exists before the launch."""
        there = {"state": state, "health": "HEALTHY", "type": kind, "hosts": {"v5p-8": 1, "v5p-16": 2}[kind]} | node
        self.write(self.state | {"node": there, "request": request and {"state": request}, "wanted": kind, "made": 1})

    def ask(self, question: str) -> str | None:
        """Return the next answer to a question of the launcher."""
        self.questions.append(question)
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, type):
            raise answer
        return answer

    def is_interrupted(self) -> bool:
        """Return whether Ctrl-C arrives now; it arrives once."""
        if self.interrupt_when is None or not self.interrupt_when(self.state):
            return False
        self.interrupt_when = None
        return True

    def call(self, *words: str, variables: dict[str, str] | None = None) -> Result:
        """Call the launcher once."""
        around = LaunchEnvironment(
            self.root, variables or {}, FastClock(self.is_interrupted), Console(self.ask), self.timing
        )
        try:
            code = main(words, around)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = self._read()
        return Result(code, out, err)

    def launch(self, *flags: str, kind: str = "v5p-16", job: tuple[str, ...] = JOB, **more: Any) -> Result:
        """Launch a job in the foreground."""
        return self.call("--foreground", *self.where, "--tpu_type", kind, *flags, *job, **more)

    def launch_on_one_host(self, *flags: str, job: tuple[str, ...] = JOB, **more: Any) -> Result:
        """Launch a job in the foreground on the smallest TPU, from an existing image."""
        return self.launch("--image", "proj/image:tag", *flags, kind="v5p-8", job=job, **more)

    def calls(self, *parts: str, at: str = "") -> list[list[str]]:
        """Return the commands that were run here, or on host `at`, and contain all of these words."""
        found = [call["words"] for call in self.state["calls"] if call["at"] == at]
        return [words for words in found if all(part in words for part in parts)]

    def everything_said(self) -> str:
        """Return all words of all commands on all machines."""
        return json.dumps(self.state["calls"])

    def home(self, host: int, life: int = 1) -> pathlib.Path:
        """Return the home folder of a host."""
        return self.folder / f"tpu_{life}" / f"host_{host}"

    def containers(self, host: int, life: int = 1) -> dict[str, Any]:
        """Return the containers of a host by name."""
        file = self.home(host, life) / "containers"
        return ast.literal_eval(file.read_text()) if file.exists() else {}

    def put_container(self, host: int, run_id: str, **container: Any) -> None:
        """Add a container that exists before the launch."""
        home = self.home(host)
        home.mkdir(parents=True, exist_ok=True)
        usual = {"id": f"{len(self.containers(host)) + 100:012x}", "label": run_id, "state": "exited", "code": 1}
        usual |= {"oom": False, "lines": ["from before"], "preempts": False}
        found = self.containers(host) | {f"simpo-{run_id}": usual | container}
        (home / "containers").write_text(repr(found))


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A small repository to ship, with one file that git does not track."""
    root = tmp_path_factory.mktemp("repository")
    (root / "experiments").mkdir()
    (root / "experiments" / "m11.py").write_text("print('hello')\n")
    (root / ".gitignore").write_text("runs/\n")
    (root / "untracked.yaml").write_text("a: 1\n")
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "experiments", ".gitignore"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    return root


@pytest.fixture
def cloud(tmp_path, repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A fake cloud on PATH, without any resources yet."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = os.path.realpath(sys.executable)
    for name in ("gcloud", "docker", "kubectl"):
        (programs / name).write_text(PROGRAM.format(python=python, fakes=str(FAKES), name=name))
        (programs / name).chmod(0o755)
    for name in ("sudo", "uv"):
        (programs / name).symlink_to(FAKES / name)
    (programs / "python").symlink_to(python)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("FAKE_CLOUD", str(tmp_path))
    return Cloud(tmp_path, repository, capsys.readouterr)
