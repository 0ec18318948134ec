"""Client that starts and controls the server of tests/gcs/server.py from a test."""

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
    """Google Cloud Storage server on this machine, in a separate process, with the bucket `bucket`."""

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
        """Return the environment for child processes whose gs:// paths must use this server."""
        # Otherwise gcsfs queries the kind of the bucket over gRPC, which the server does not support.
        return {**os.environ, "STORAGE_EMULATOR_HOST": self.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def log(self) -> list[dict[str, Any]]:
        """Return the requests so far, each with method, path, kind, status, bytes and fault.

        Status 0 means that the request was not executed.
        """
        return self._json("GET", "log")

    def reset_log(self) -> None:
        self._json("POST", "reset_log")

    def faults(self, **config: Any) -> None:
        """Make requests fail from now on. `config` has the fields of `Faults` in faults.py."""
        self._json("POST", "faults", config)

    def no_faults(self) -> None:
        self._json("POST", "faults", {})

    def stop_at(self, **config: Any) -> None:
        """Count requests from now on, and stop a process. `config` has the fields of `StopAt` in faults.py."""
        self._json("POST", "stop_at", config)

    def stop_state(self) -> dict[str, Any]:
        """Return the number of requests since `stop_at`, and whether the signal was sent."""
        return self._json("GET", "stop_at")

    def objects(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Return size, crc32c (hex) and generation of each object whose name starts with `prefix`.

        This bypasses fsspec, the log and the faults.
        """
        return self._json("GET", f"objects?{urlencode({'prefix': prefix})}")

    def read(self, name: str) -> bytes:
        """Return the content of an object. This bypasses fsspec, the log and the faults.

        Raises:
            FileNotFoundError: The object does not exist.
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
