"""Python interpreter for scripts that tests start: the fork server runs the script, and this program stands in for it.

    python.py SCRIPT [ARGUMENT ...]

It passes its streams, working directory, environment and signals on to a fork of the server (`server.py`), which has
already imported JAX. It exits with the exit code or signal of the fork. If this program is killed, the server
kills the fork.
"""

import array
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(words):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(os.environ["TESTS_FORK_SERVER"])
        request = json.dumps({"argv": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        streams = array.array("i", (0, 1, 2))
        server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        server.sendall(request)
        answers = server.makefile("r")
        pid = int(answers.readline())
        for number in FORWARDED:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        code = int(answers.readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
