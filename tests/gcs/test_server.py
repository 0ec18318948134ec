import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import pytest

sys.path.append(str(Path(__file__).parent))
from client import GcsServer

OBJECTS = "/storage/v1/b/bucket/o"
UPLOADS = "/upload/storage/v1/b/bucket/o"
JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": "multipart/related; boundary=part"}
CHANGING = ["POST", "PUT", "PATCH", "DELETE"]


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Http:
    """HTTP client that sends requests over one open connection."""

    def __init__(self, server: GcsServer):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def __call__(self, method: str, path: str, body: bytes | None = None, headers: Any = None, **query: Any):
        separator = "&" if "?" in path else "?"
        self.connection.request(method, f"{path}{separator}{urlencode(query)}", body, headers or {})
        with self.connection.getresponse() as response:
            return Reply(response.status, response.headers, response.read())

    def multipart(self, name: str, data: bytes, **query: Any) -> Reply:
        resource = json.dumps({"name": name}).encode()
        body = b"--part\r\nContent-Type: application/json\r\n\r\n" + resource
        body += b"\r\n--part\r\nContent-Type: text/plain\r\n\r\n" + data + b"\r\n--part--"
        return self("POST", UPLOADS, body, MULTIPART, uploadType="multipart", **query)

    def media(self, name: str, data: bytes, **query: Any) -> Reply:
        return self("POST", UPLOADS, data, uploadType="media", name=name, **query)

    def start(self, name: str, **query: Any) -> str:
        resource = json.dumps({"name": name}).encode()
        started = self("POST", UPLOADS, resource, JSON, uploadType="resumable", **query)
        assert started.status == 200
        location = urlsplit(started.headers["Location"])
        return f"{location.path}?{location.query}"

    def chunk(self, location: str, data: bytes, start: int, total: object) -> Reply:
        return self("PUT", location, data, {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}"})

    def resumable(self, name: str, data: bytes, **query: Any) -> Reply:
        return self.chunk(self.start(name, **query), data, 0, len(data))

    def delete(self, name: str, data: bytes, **query: Any) -> Reply:
        return self("DELETE", f"{OBJECTS}/{quote(name, safe='')}", **query)

    def patch(self, name: str, data: bytes, **query: Any) -> Reply:
        body = json.dumps({"metadata": {"key": data.decode()}}).encode()
        return self("PATCH", f"{OBJECTS}/{quote(name, safe='')}", body, JSON, **query)

    def get(self, name: str, data: bytes = b"", **query: Any) -> Reply:
        return self("GET", f"{OBJECTS}/{quote(name, safe='')}", **query)

    def read(self, name: str, data: bytes = b"", **query: Any) -> Reply:
        return self.get(name, alt="media", **query)


@pytest.fixture(scope="module")
def server():
    with GcsServer() as started:
        yield started


@pytest.fixture
def plain(server: GcsServer):
    client = Http(server)
    yield client
    client.connection.close()
    server.no_faults()


@pytest.fixture
def name() -> str:
    return f"{uuid.uuid4().hex}/a b"


@pytest.fixture(scope="module")
def filesystem(server: GcsServer):
    # Use the core class, independently of the environment at the first import of gcsfs.
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(token="anon", endpoint_url=server.url, use_listings_cache=False, skip_instance_cache=True)


def error_of(reply: Reply) -> tuple[int, str, str]:
    error = json.loads(reply.body)["error"]
    return error["code"], error["message"], error["errors"][0]["reason"]


@pytest.mark.parametrize("kind", ["multipart", "media", "resumable"])
def test_conditions_on_an_absent_object_apply_to_uploads(server: GcsServer, plain: Http, name: str, kind: str):
    upload = getattr(plain, kind)
    assert upload(name, b"x", ifGenerationMatch=5).status == 412
    assert upload(name, b"x", ifMetagenerationMatch=1).status == 412
    assert upload(name, b"x", ifGenerationNotMatch=0).status == 304
    assert server.objects(name) == {}
    assert upload(name, b"x", ifGenerationMatch=0).status == 200
    assert server.read(name) == b"x"


@pytest.mark.parametrize("kind", ["multipart", "media", "resumable", "patch", "get", "read", "delete"])
def test_conditions_on_a_live_object_apply_to_every_request(server: GcsServer, plain: Http, name: str, kind: str):
    ask = getattr(plain, kind)
    generation = int(json.loads(plain.media(name, b"old").body)["generation"])
    there = server.objects(name)
    for refused in [{"ifGenerationMatch": 0}, {"ifGenerationMatch": generation - 1}, {"ifMetagenerationMatch": 2}]:
        reply = ask(name, b"new", **refused)
        assert reply.status == 412
        message = "At least one of the pre-conditions you specified did not hold."
        assert error_of(reply) == (412, message, "conditionNotMet")
    for refused in [{"ifGenerationNotMatch": generation}, {"ifMetagenerationNotMatch": 1}]:
        assert ask(name, b"new", **refused).status == 304
    assert server.objects(name) == there and server.read(name) == b"old"
    # Read before patch before replace: each accepted request may change what the next one finds.
    accepted = {"ifGenerationMatch": generation, "ifGenerationNotMatch": generation - 1, "ifMetagenerationMatch": 1}
    assert ask(name, b"new", **accepted, ifMetagenerationNotMatch=7).status in (200, 204)
    assert (server.objects(name) != there) == (kind not in ("get", "read", "patch"))


@pytest.mark.parametrize("kind", ["patch", "get", "read", "delete"])
def test_an_absent_object_is_not_found_under_any_conditions(plain: Http, name: str, kind: str):
    for query in [{}, {"ifGenerationMatch": 5}, {"ifGenerationMatch": 0}]:
        reply = getattr(plain, kind)(name, b"x", **query)
        assert error_of(reply) == (404, f"No such object: bucket/{name}", "notFound")


def test_the_condition_of_a_resumable_upload_is_checked_at_its_end(server: GcsServer, plain: Http, name: str):
    location = plain.start(name, ifGenerationMatch=0)
    assert plain.chunk(location, b"a" * 262144, 0, "*").status == 308
    plain.media(name, b"of another")
    assert plain.chunk(location, b"b", 262144, 262145).status == 412
    assert server.read(name) == b"of another"


def test_repeated_chunks_and_a_repeated_end_change_nothing(server: GcsServer, plain: Http, name: str):
    location = plain.start(name)
    for _ in range(2):
        assert plain.chunk(location, b"abc", 0, "*").headers["Range"] == "bytes=0-2"
    ends = [plain.chunk(location, b"de", 3, 5) for _ in range(2)]
    assert [end.status for end in ends] == [200, 200] and ends[0].body == ends[1].body
    assert server.read(name) == b"abcde"
    cancelled = plain.start(name)
    assert plain("DELETE", cancelled).status == 499
    assert plain.chunk(cancelled, b"x", 0, 1).status == 404


def test_generations_increase_and_name_what_is_read(plain: Http, name: str):
    written = [json.loads(plain.media(name, str(number).encode()).body) for number in range(50)]
    generations = [int(each["generation"]) for each in written]
    assert generations == sorted(set(generations))
    live = written[-1]
    paths = [f"{OBJECTS}/{quote(name, safe='')}", f"/download/storage/v1/b/bucket/o/{quote(name, safe='')}"]
    for path in paths:
        headers = plain("GET", path, alt="media").headers
        assert headers["x-goog-generation"] == live["generation"] and headers["x-goog-metageneration"] == "1"
        assert headers["x-goog-stored-content-length"] == "2"
        assert headers["X-Goog-Hash"] == f"crc32c={live['crc32c']},md5={live['md5Hash']}"
    for ask in (plain.read, plain.get, plain.delete):
        assert ask(name, b"", generation=generations[0]).status == 404
        assert ask(name, b"", generation=generations[-1]).status in (200, 204)


def test_ranges_of_an_object(plain: Http, name: str):
    plain.media(name, b"0123456789")
    path = f"{OBJECTS}/{quote(name, safe='')}"
    wanted = {"bytes=2-4": (206, b"234"), "bytes=7-": (206, b"789"), "bytes=-2": (206, b"89")}
    for text, expected in wanted.items():
        reply = plain("GET", path, headers={"Range": text}, alt="media")
        assert (reply.status, reply.body) == expected
    assert plain("GET", path, headers={"Range": "bytes=10-"}, alt="media").status == 416


@pytest.mark.parametrize("data", [b"", b"\r", b"\n", b"x\r\n", b"--part\r\n", bytes(range(256)) * 3 + b"\n\n\r"])
def test_gcsfs_reads_back_what_it_wrote(server: GcsServer, filesystem: Any, name: str, data: bytes):
    filesystem.pipe_file(f"bucket/{name}", data)
    assert filesystem.cat_file(f"bucket/{name}") == data == server.read(name)
    assert filesystem.info(f"bucket/{name}")["size"] == len(data)


# gcsfs passes bytes to aiohttp, which warns about bodies of more than a megabyte.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_gcsfs_writes_a_large_file_in_chunks(server: GcsServer, filesystem: Any, name: str):
    data = os.urandom(6 * 2**20)
    with filesystem.open(f"bucket/{name}", "wb", block_size=2**21) as file:
        file.write(data)
    assert server.read(name) == data
    assert {entry["kind"] for entry in server.log() if entry["path"] == name} == {"insert"}


def test_listings_come_in_pages(server: GcsServer, plain: Http, filesystem: Any, name: str):
    for number in range(1100):
        assert plain.media(f"{name}/{number // 100:02}/{number:04}", b"x").status == 200
    server.reset_log()
    assert len(filesystem.find(f"bucket/{name}")) == 1100
    assert [(entry["kind"], entry["path"]) for entry in server.log()] == [("list", f"{name}/")] * 2
    assert len(filesystem.ls(f"bucket/{name}")) == 11
    names: list[str] = []
    token: dict[str, Any] = {}
    plain.media(f"{name}/000", b"x")
    while True:
        page = json.loads(plain("GET", OBJECTS, prefix=f"{name}/", delimiter="/", maxResults=10, **token).body)
        found = [item["name"] for item in page.get("items", [])] + page.get("prefixes", [])
        assert len(found) <= 10
        names += found
        if "nextPageToken" not in page:
            break
        token = {"pageToken": page["nextPageToken"]}
    assert len(names) == len(set(names)) == 12


def test_the_log_lists_the_requests(server: GcsServer, plain: Http, name: str):
    server.reset_log()
    for kind in ("multipart", "patch", "get", "read", "delete"):
        getattr(plain, kind)(name, b"abc")
    log = server.log()
    assert [entry["kind"] for entry in log] == ["insert", "patch", "get", "media", "delete"]
    assert [entry["status"] for entry in log] == [200, 200, 200, 200, 204]
    assert {entry["path"] for entry in log} == {name} and log[3]["bytes"] == 3


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut_before"])
def test_a_fault_before_the_request_changes_nothing(server: GcsServer, plain: Http, name: str, fault: str):
    server.faults(kinds=[fault], match="^" + name, methods=["POST"])
    server.reset_log()
    if fault == "cut_before":
        with pytest.raises(http.client.RemoteDisconnected):
            plain.media(name, b"x")
    else:
        assert error_of(plain.media(name, b"x"))[0] == int(fault)
    assert plain.media("another", b"x").status == 200
    assert plain.read(name).status == 404
    assert [entry["fault"] for entry in server.log()] == [fault, None, None]


def test_a_request_cut_afterwards_was_executed(server: GcsServer, plain: Http, name: str):
    server.faults(kinds=["cut_after"])
    seen: set[type[Exception]] = set()
    for number in range(20):
        with pytest.raises(http.client.HTTPException) as cut:
            plain.media(name, str(number).encode())
        seen.add(cut.type)
        plain.connection.close()
        assert server.read(name) == str(number).encode()
    assert seen == {http.client.RemoteDisconnected, http.client.IncompleteRead}


def test_a_lost_deletion_and_a_slow_response(server: GcsServer, plain: Http, name: str):
    plain.media(name, b"x")
    server.faults(kinds=["delete_lost"], times=1)
    assert plain.read(name).status == 200
    assert [plain.delete(name, b"").status for _ in range(2)] == [503, 404]
    server.faults(kinds=["slow"], slow_seconds=0.3)
    begin = time.monotonic()
    assert plain.media(name, b"x").status == 200
    assert time.monotonic() - begin > 0.3
    with pytest.raises(ValueError, match="no faults"):
        server.faults(kinds=["flood"])


def test_the_same_seed_gives_the_same_faults(server: GcsServer, plain: Http, name: str):
    def statuses() -> list[int]:
        server.faults(seed=3, rate=0.3, kinds=["429", "503"])
        return [plain.media(name, b"x").status for _ in range(40)]

    first = statuses()
    assert first == statuses() and set(first) == {200, 429, 503}


def test_gcsfs_retries_a_creation_and_finds_its_own_object(server: GcsServer, filesystem: Any, plain: Http, name: str):
    server.faults(kinds=["cut_after"], times=1, match="^" + name)
    server.reset_log()
    with pytest.raises(FileExistsError):
        filesystem.pipe_file(f"bucket/{name}", b"mine", mode="create")
    assert server.read(name) == b"mine"
    assert [entry["status"] for entry in server.log()] == [200, 412]


WRITER = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
sys.stdin.readline()
for number in range(1, 6):
    connection.request("POST", f"/upload/storage/v1/b/bucket/o?uploadType=media&name={sys.argv[2]}{number}", b"x")
    connection.getresponse().read()
"""


def write_five(server: GcsServer, prefix: str, when: str, signal_name: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(server.port), prefix]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    server.stop_at(pid=process.pid, request=3, when=when, signal=signal_name, methods=CHANGING, match=prefix)
    with process.stdin as go:
        go.write("go\n")
    return process


@pytest.mark.parametrize(("when", "expected"), [("before", 2), ("after", 3)])
def test_a_process_is_killed_at_a_request(server: GcsServer, when: str, expected: int):
    prefix = uuid.uuid4().hex
    process = write_five(server, prefix, when, "KILL")
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert server.stop_state() == {"counted": 3, "fired": True}
    assert list(server.objects(prefix)) == [f"{prefix}{number}" for number in range(1, expected + 1)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_is_stopped_at_a_request_and_continues(server: GcsServer, when: str):
    prefix = uuid.uuid4().hex
    process = write_five(server, prefix, when, "STOP")
    while len(server.objects(prefix)) < 3 or not server.stop_state()["fired"]:
        time.sleep(0.01)
    assert Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T"
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(timeout=30) == 0
    assert len(server.objects(prefix)) == 5


def test_no_increment_is_lost(server: GcsServer, plain: Http, name: str):
    plain.media(name, b"0")

    def increment():
        client = Http(server)
        done = 0
        while done < 10:
            there = client.read(name)
            more = str(int(there.body) + 1).encode()
            done += client.multipart(name, more, ifGenerationMatch=there.headers["x-goog-generation"]).status == 200
        client.connection.close()

    threads = [threading.Thread(target=increment) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.read(name) == b"80"


def test_clients_that_disconnect_do_no_harm(capfd: pytest.CaptureFixture[str]):
    half = f"POST {UPLOADS}?uploadType=media&name=x HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc"
    whole = f"GET {OBJECTS} HTTP/1.1\r\n\r\n"
    with GcsServer() as server:
        server.faults(kinds=["slow"], slow_seconds=0.05)
        for text in ("", "POST ", half, whole):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(text.encode())
                # Closing sends a reset, so the server sees a dropped connection.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.2)
        assert server.objects() == {}
    assert capfd.readouterr() == ("", "")
