"""A job of many local processes, each of which stands for a host with its own CPU devices."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

# How long the other processes have to exit by themselves after one has failed. This is longer than they need to detect
# its silence (`WatchConfig.silence_seconds`) and to record why the job ends.
GRACE_SECONDS = 20.0
INTERRUPT_SECONDS = 5.0
LAST_LINES = 20
POLL_SECONDS = 0.1


class Host:
    """One process of the job, and the thread that prints its output."""

    def __init__(self, index: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.index = index
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        # A separate session: Ctrl-C reaches it only through the launcher, and its children are killed with it.
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._pass_lines_on, daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """Exit code as reported by a shell (128 + signal); None while the process is running."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def send(self, signal_number: int) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal_number)

    def finish_reading(self) -> None:
        """Wait until the remaining output of the process is printed."""
        self._reader.join(timeout=INTERRUPT_SECONDS)

    def _pass_lines_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.last_lines.append(line.rstrip("\n"))
            print(f"[{self.index}] {line}", end="", flush=True)


def host_environment(base: Mapping[str, str], index: int, count: int, port: int | str, devices: int) -> dict[str, str]:
    """Return the environment that makes a process part of the job and gives it its own CPU devices."""
    return {
        **base,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """Return a port that is currently free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for_all(hosts: Sequence[Host], grace_seconds: float) -> Host | None:
    """Wait until every process has exited. Kill the rest `grace_seconds` after one has failed.

    Returns:
        The first process that was seen to fail, or None. If several exit at about the same time, it is not always the
        cause of the failure; the output of the job names the cause.
    """
    first_failed: Host | None = None
    deadline = float("inf")
    while any(host.exit_code is None for host in hosts):
        if first_failed is None:
            first_failed = next((host for host in hosts if host.exit_code), None)
            if first_failed is not None:
                deadline = time.monotonic() + grace_seconds
        if time.monotonic() > deadline:
            end_all(hosts, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    return first_failed or next((host for host in hosts if host.exit_code), None)


def end_all(hosts: Sequence[Host], signal_number: int) -> None:
    """Send a signal to every process that is still running."""
    for host in hosts:
        if host.exit_code is None:
            host.send(signal_number)


def interrupt_all(hosts: Sequence[Host]) -> None:
    """Interrupt every process, and wait for a limited time: one may be stuck in a collective, or frozen."""
    end_all(hosts, signal.SIGINT)
    deadline = time.monotonic() + INTERRUPT_SECONDS
    while any(host.exit_code is None for host in hosts) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def run_local(
    command: Sequence[str],
    count: int,
    devices: int,
    variables: Mapping[str, str] = MappingProxyType({}),
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run the command in `count` processes of one job and return the exit code. `variables` are added to our own."""
    # SIGINT too: a shell starts background commands with SIGINT ignored, and Python keeps it ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_on_termination)
    port = free_port()
    hosts: list[Host] = []
    try:
        for index in range(count):
            hosts.append(
                Host(index, command, host_environment({**os.environ, **variables}, index, count, port, devices))
            )
        first_failed = wait_for_all(hosts, grace_seconds)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C skips the wait
            interrupt_all(hosts)
        print("Job interrupted.", file=sys.stderr)
        return 130
    finally:
        for host in hosts:
            host.send(signal.SIGKILL)  # also kills children that an exited process left behind
    for host in hosts:
        host.finish_reading()
    if first_failed is None:
        print("Job finished with no error.", flush=True)
        return 0
    report_failure(first_failed, count)
    return first_failed.exit_code or 1


def report_failure(host: Host, count: int) -> None:
    """Report which process failed first, with its last lines."""
    lines = "\n".join(f"    {line}" for line in host.last_lines)
    print(
        f"Job failed: host {host.index} of {count} exited with code {host.exit_code}; no other host failed before it. "
        f"Its last lines:\n{lines}",
        file=sys.stderr,
        flush=True,
    )


def end_on_termination(signal_number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt, so that Ctrl-C, a closed terminal or a scheduler's SIGTERM leaves no process behind."""
    raise KeyboardInterrupt
