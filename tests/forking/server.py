"""Fork server: it makes the slow imports once, and forks for each script that tests start.

    server.py SOCKET

`python.py` is its client. A fork gets the streams, working directory, environment and arguments of its client, and JAX
reads its settings from that environment as at import time. The server starts no thread and touches no device, so that a
fork behaves like a new process. The server moves to the background when it is ready, and exits when SOCKET is removed.
"""

import array
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
from typing import Any

import gcsfs  # noqa: F401  # takes a second to import, in scripts that use a bucket
import jax
from transformers import AutoTokenizer  # noqa: F401  # most of transformers is imported at the first use of this name

import simpo_pipeline.handoff.handoff
import simpo_pipeline.inference.llm
import simpo_pipeline.model.hf_export
import simpo_pipeline.training.checkpoints
import simpo_pipeline.training.evaluation
import simpo_pipeline.training.trainer  # noqa: F401

CHECK_SECONDS = 1.0


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a client's request and its streams."""
    streams = array.array("i")
    head, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
    for _, _, data in ancillary:
        streams.frombytes(data[: len(data) - len(data) % streams.itemsize])
    size, parts = int.from_bytes(head, "big"), b""
    while len(parts) < size:
        part = client.recv(size - len(parts))
        if not part:
            raise ConnectionError("the client is gone")
        parts += part
    return json.loads(parts), list(streams)


class Server:
    """Server that knows each running fork with the connection of its client."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"{path}.new")
        self._listener.listen(64)
        os.rename(f"{path}.new", path)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake_up, self._on_signal = socket.socketpair()
        for end in (self._wake_up, self._on_signal):
            end.setblocking(False)
        signal.set_wakeup_fd(self._on_signal.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(self._wake_up, selectors.EVENT_READ)
        self._clients: dict[int, socket.socket] = {}

    def serve(self) -> dict[str, Any] | None:
        """Serve until the socket is removed. Return a request in each fork, and None in the server at the end."""
        while os.path.exists(self._path):
            for key, _ in self._selector.select(CHECK_SECONDS):
                if key.fileobj is self._listener:
                    request = self._fork()
                    if request is not None:
                        return request
                elif key.fileobj is self._wake_up:
                    self._wake_up.recv(4096)
                else:
                    self._end(key.data)
            self._report_ended()
        for pid in self._clients:
            os.kill(pid, signal.SIGKILL)
        return None

    def _fork(self) -> dict[str, Any] | None:
        client, _ = self._listener.accept()
        try:
            request, streams = receive(client)
        except (ConnectionError, ValueError):
            client.close()
            return None
        pid = os.fork()
        if pid == 0:
            client.close()
            self._become(streams)
            return request
        for stream in streams:
            os.close(stream)
        self._clients[pid] = client
        with contextlib.suppress(OSError):  # a disconnected client is handled by the loop
            client.sendall(f"{pid}\n".encode())
        self._selector.register(client, selectors.EVENT_READ, pid)
        return None

    def _become(self, streams: list[int]) -> None:
        """Give a fork the state of a new process."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for client in self._clients.values():
            client.close()
        self._selector.close()
        self._listener.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdin = sys.__stdin__ = open(0, closefd=False)
        sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)
        sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)

    def _end(self, pid: int) -> None:
        """Kill the fork of a client that has closed its connection; clients send nothing after their request."""
        if pid in self._clients:
            client = self._clients.pop(pid)
            self._selector.unregister(client)
            client.close()
            with contextlib.suppress(ProcessLookupError):  # the fork has not created its process group yet
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)

    def _report_ended(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            client = self._clients.pop(pid, None)
            if client is not None:
                self._selector.unregister(client)
                with client, contextlib.suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def update_jax(environment: dict[str, str]) -> None:
    """Set what jax reads from the environment when it is imported."""
    for name, text in environment.items():
        setting = name.lower()
        if not setting.startswith("jax_") or setting not in jax.config.values:
            continue
        before = jax.config.values[setting]
        if isinstance(before, bool):
            jax.config.update(setting, text.lower() in ("1", "true", "yes", "on"))
        else:
            jax.config.update(setting, type(before)(text) if isinstance(before, int | float) else text)


def run(request: dict[str, Any]) -> None:
    """Run a script as `python SCRIPT` does."""
    script = request["argv"][0]
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = list(request["argv"])
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    update_jax(request["environment"])
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    server = Server(sys.argv[1])
    if os.fork() != 0:
        os._exit(0)  # the exit signals to the caller that the server is ready
    # Otherwise the garbage collector of each fork traverses all imported objects at exit and copies their memory pages.
    gc.freeze()
    request = server.serve()
    if request is not None:
        run(request)
