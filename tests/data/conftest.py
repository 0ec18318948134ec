"""The byte tokenizer shared by all data tests, and a fake hub on the loopback interface."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec.config
import pytest

from simpo_pipeline.data.byte_tokenizer import write_byte_tokenizer
from simpo_pipeline.data.chat import load_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    write_byte_tokenizer(str(folder))
    return folder


@pytest.fixture
def tokenizer(byte_tokenizer_dir: Path) -> Any:
    return load_tokenizer(str(byte_tokenizer_dir))


def _hub_handler(files: dict[str, bytes], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Hub(BaseHTTPRequestHandler):
        """Handler for the three requests of HfFileSystem: repository info, file listing, and byte ranges of a file."""

        def do_GET(self) -> None:
            requests.append(self.path)
            if "/tree/" in self.path:
                tree = [{"type": "file", "oid": "0", "size": len(data), "path": path} for path, data in files.items()]
                self.answer(200, json.dumps(tree).encode())
            elif self.path.startswith("/api/"):
                self.answer(200, json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": []}).encode())
            else:
                data = next(data for path, data in files.items() if self.path.endswith(path))
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                self.answer(206, data[int(first) : int(last) + 1])

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Hub


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes]], list[str]]]:
    """Return a function that serves files as one hub dataset and returns the growing list of requested paths."""
    servers: list[ThreadingHTTPServer] = []

    def serve(files: dict[str, bytes]) -> list[str]:
        requests: list[str] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), _hub_handler(files, requests))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{server.server_port}"})
        return requests

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
