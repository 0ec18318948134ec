"""Google Cloud Storage for tests: `python tests/gcs/server.py --port P` serves an in-memory bucket on 127.0.0.1.

This is a thin layer over the package gcp-storage-emulator. `/_control/` gives access to the log, the faults and the
objects. Requests there are not counted and never fail. The server prints `ready` when it listens. tests/gcs/client.py
starts and controls it.
"""

import argparse
import base64
import contextlib
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from calls import Call, parse_call
from faults import Faults, StopAt, status_of
from gcp_storage_emulator.server import RequestHandler
from preconditions import Answer, error_answer, json_answer
from service import Service

BUCKET = "bucket"
CONTROL = "/_control/"


class GcsHttpServer(ThreadingHTTPServer):
    """HTTP server with the service, the log and the faults, which the threads of all connections share."""

    # With the default of 5, simultaneous connections are dropped and retried a second later.
    request_queue_size = 128

    def __init__(self, port: int, parent: int | None):
        self.service = Service(BUCKET)
        self.parent = parent
        self.lock = threading.Lock()
        """Lock of the log, the faults and the stop."""
        self.log: list[dict[str, Any]] = []
        self.faults = Faults()
        self.stop = StopAt()
        super().__init__(("127.0.0.1", port), functools.partial(Handler, self.service.storage))

    def service_actions(self):
        """Exit when the process that started the server is gone, even if it was killed. Called twice a second."""
        if self.parent not in (None, os.getppid()):
            os._exit(0)

    def handle_error(self, request, client_address):
        """Ignore errors of disconnected clients."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(RequestHandler):
    """Handler of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def gcs(self) -> GcsHttpServer:
        assert isinstance(self.server, GcsHttpServer)
        return self.server

    def _serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._send(error_answer(400, "The test server takes only bodies that come with Content-Length."))
        elif self.path.startswith(CONTROL):
            self._send(self._control(body))
        elif len(body) == int(self.headers.get("Content-Length", 0)):
            self._serve_call(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _serve_call(self, body: bytes) -> None:
        try:
            call = parse_call(self.command, self.path, self.headers, body)
        except Exception as error:
            self._send(error_answer(400, f"The test server cannot read this request: {error!r}"))
            return
        call.name = call.name or self.gcs.service.name_of_upload(call.upload_id)
        with self.gcs.lock:
            stop = self.gcs.stop if self.gcs.stop.is_due(call.method, call.name) else None
            faults = self.gcs.faults
            fault = faults.choose(call.method, call.name)
            half = faults.cuts_in_the_middle() if fault == "cut_after" else False
        if stop and stop.when == "before":
            self._fire(stop)
            if stop.signal == "KILL":
                fault = "cut_before"
        answer = self._carry_out(call, fault, faults.slow_seconds)
        if stop and stop.when == "after":
            self._fire(stop)
        self._note(call, answer, fault)
        if fault not in ("cut_before", "cut_after"):
            self._send(answer)
        else:
            self._cut(answer if half else None)

    def _fire(self, stop: StopAt) -> None:
        # With the lock held, `GET stop_at` waits and reports the signal only after it has taken effect.
        with self.gcs.lock:
            stop.fire()

    def _carry_out(self, call: Call, fault: str | None, slow_seconds: float) -> Answer:
        status = status_of(fault)
        if status is not None:
            return error_answer(status, "A fault on purpose.")
        if fault == "cut_before":
            return Answer(0)
        if fault == "slow":
            time.sleep(slow_seconds)
        answer = self.gcs.service.perform(call, self.gcs)
        return error_answer(503, "A fault on purpose, after the deletion.") if fault == "delete_lost" else answer

    def _note(self, call: Call, answer: Answer, fault: str | None) -> None:
        entry = {"method": call.method, "path": call.name, "kind": call.kind, "status": answer.status}
        entry |= {"bytes": len(call.body) or len(answer.body), "fault": fault}
        with self.gcs.lock:
            self.gcs.log.append(entry)

    def _send(self, answer: Answer, length: int | None = None) -> None:
        """Send the answer, or only the first `length` bytes of its body if `length` is given."""
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[:length])

    def _cut(self, answer: Answer | None) -> None:
        """Close the connection, in the middle of the answer if there is one with a body."""
        if answer is not None and answer.body:
            self._send(answer, len(answer.body) // 2)
        self.close_connection = True
        with contextlib.suppress(OSError):  # a killed client has already closed it
            self.connection.shutdown(socket.SHUT_RDWR)

    def _control(self, body: bytes) -> Answer:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.gcs.lock:
            try:
                return self._controlled(f"{self.command} {url.path.removeprefix(CONTROL)}", query, body)
            except (KeyError, TypeError, ValueError) as error:
                return error_answer(400, str(error))

    def _controlled(self, command: str, query: dict[str, str], body: bytes) -> Answer:
        server = self.gcs
        match command:
            case "GET log":
                return json_answer(server.log)
            case "POST reset_log":
                server.log = []
            case "POST faults":
                server.faults = Faults(**json.loads(body))
            case "POST stop_at":
                server.stop = StopAt(**json.loads(body))
            case "GET stop_at":
                return json_answer({"counted": server.stop.counted, "fired": server.stop.fired})
            case "GET objects":
                return json_answer(_summaries(server.service, query.get("prefix", "")))
            case "GET object":
                content = server.service.content(BUCKET, query["name"])
                return error_answer(404, query["name"]) if content is None else Answer(200, body=content)
            case _:
                return error_answer(404, f"There is no control {command!r}.")
        return json_answer({})


def _summaries(service: Service, prefix: str) -> dict[str, dict[str, Any]]:
    return {
        item["name"]: {
            "size": int(item["size"]),
            "crc32c": base64.b64decode(item["crc32c"]).hex(),
            "generation": item["generation"],
        }
        for item in service.objects(BUCKET, prefix)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, help="end when this is no longer the parent process")
    flags = parser.parse_args()
    logging.disable()
    server = GcsHttpServer(flags.port, flags.parent)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
