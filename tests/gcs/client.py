"""Starts and controls the server of tests/gcs/server.py from a test."""

import json
import os
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

_HOST = "127.0.0.1"


class GcsServer:
    """A server of Google Cloud Storage on this machine, in a process of its own, with the bucket `bucket`."""

    def __init__(self):
        with socket.socket() as free:
            free.bind((_HOST, 0))
            self.port: int = free.getsockname()[1]
        program = Path(__file__).with_name("server.py")
        command = [sys.executable, str(program), "--port", str(self.port), "--parent", str(os.getpid())]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        with self._process.stdout as output:
            said = output.readline()
        if said != "ready\n":
            self.close()
            raise RuntimeError(f"{program} did not start: {said!r}")

    def __enter__(self) -> "GcsServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def environment(self) -> dict[str, str]:
        """For child processes whose gs:// paths are to lead here."""
        # gcsfs else asks over gRPC what kind of bucket this is, and the server speaks none.
        return {**os.environ, "STORAGE_EMULATOR_HOST": self.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def log(self) -> list[dict[str, Any]]:
        """The requests so far, each with method, path, kind, status, bytes and fault; status 0: nothing was done."""
        return self._json("GET", "log")

    def reset_log(self) -> None:
        self._json("POST", "reset_log")

    def faults(self, **config: Any) -> None:
        """From now on requests fail as `Faults` in faults.py says, whose fields `config` has."""
        self._json("POST", "faults", config)

    def no_faults(self) -> None:
        self._json("POST", "faults", {})

    def stop_at(self, **config: Any) -> None:
        """From now on count requests, and stop a process as `StopAt` in faults.py says, whose fields `config` has."""
        self._json("POST", "stop_at", config)

    def stop_state(self) -> dict[str, Any]:
        """How many requests were counted since `stop_at`, and whether the signal was sent."""
        return self._json("GET", "stop_at")

    def objects(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Size, crc32c (hex) and generation of each object whose name begins so; past fsspec, log and faults."""
        return self._json("GET", f"objects?{urlencode({'prefix': prefix})}")

    def read(self, name: str) -> bytes:
        """The content of an object; past fsspec, log and faults.

        Raises:
            FileNotFoundError: there is no such object.
        """
        status, content = self._control("GET", f"object?{urlencode({'name': name})}")
        if status == 404:
            raise FileNotFoundError(name)
        return content

    def _json(self, method: str, command: str, config: dict[str, Any] | None = None) -> Any:
        status, content = self._control(method, command, json.dumps(config).encode() if config is not None else None)
        if status != 200:
            raise ValueError(json.loads(content)["error"]["message"])
        return json.loads(content)

    def _control(self, method: str, command: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = HTTPConnection(_HOST, self.port, timeout=60)
        try:
            connection.request(method, f"/_control/{command}", body=body)
            with connection.getresponse() as response:
                return response.status, response.read()
        finally:
            connection.close()
