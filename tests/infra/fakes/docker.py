"""A fake docker: builds and pushes images on this machine, and runs containers on each host."""

import os
import sys
import time

from cloud_state import fail_if_planned, locked_state, lose_tpu, note_call, option

HOST = os.environ.get("FAKE_HOST")
FILE = f"{os.environ['HOME']}/containers"


def containers():
    if not os.path.exists(FILE):
        return {}
    with open(FILE) as file:
        return eval(file.read())


def save(found):
    with open(f"{FILE}.new", "w") as file:
        file.write(repr(found))
    os.replace(f"{FILE}.new", FILE)


def behaviour():
    """Return the planned behaviour of this host in this life of the TPU."""
    with locked_state() as state:
        lives = state["plan"].get("containers", [])
    life = int(os.environ["FAKE_LIFE"])
    hosts = lives[min(life, len(lives)) - 1] if lives else {}
    return hosts.get(HOST, hosts.get("all", {}))


def run(words):
    name = option(words, "--name")
    found = containers()
    if name in found:
        sys.exit("docker: Conflict. The container name is already in use.")
    plan = behaviour()
    with open(option(words, "--env-file")) as file:
        environment = dict(line.rstrip("\n").split("=", 1) for line in file)
    container = {
        "id": f"{len(found) + 1:012x}",
        "label": option(words, "--label").partition("=")[2],
        "state": "running" if plan.get("hangs") else "exited",
        "code": plan.get("code", 0),
        "oom": plan.get("oom", False),
        "lines": plan.get("lines", [f"hello from {HOST}"]),
        "preempts": plan.get("preempts", False),
        "ended": plan.get("ended", "2026-01-01T00:00:00Z"),
        "environment": environment,
        "command": words[words.index("--env-file") + 2 :],
    }
    save({**found, name: container})
    with locked_state() as state:
        state["started"].append([os.environ["FAKE_LIFE"], HOST, name])


def logs(words):
    name = words[-1]
    found = next(c for n, c in containers().items() if name in (n, c["id"]))
    sys.stdout.write("".join(line if line.endswith("\r") else f"{line}\n" for line in found["lines"]))
    sys.stdout.flush()
    if "--follow" in words:
        if found["preempts"]:
            with locked_state() as state:
                lose_tpu(state)
            return
        while containers().get(name, {}).get("state") == "running":
            time.sleep(0.01)


def ps(words):
    wanted = option(words, "--filter")
    for name, container in containers().items():
        if wanted.startswith("name=") and wanted != f"name=^{name}$":
            continue
        if "--quiet" in words:
            print(container["id"])
        else:
            print(f"@launch job {container['label']} {container['state']}")


def inspect(words):
    found = containers().get(words[-1])
    if found is None:
        sys.exit("Error: No such container")
    words = [found["state"], str(found["code"]), str(found["oom"]).lower(), found.get("ended", "2026-01-01T00:00:00Z")]
    print("@launch state", *words)


def stop(words):
    found = containers()
    if words[-1] not in found:
        sys.exit("Error: No such container")
    if found[words[-1]]["state"] == "running":
        found[words[-1]].update(state="exited", code=137)
    save(found)


def remove(words):
    save({name: c for name, c in containers().items() if c["id"] != words[-1]})


def build(words):
    size = len(sys.stdin.buffer.read())
    with locked_state() as state:
        state["built"].append([option(words, "--tag"), size])


def push(words):
    with locked_state() as state:
        state["pushed"].append(words[-1])


def main(words):
    note_call("docker")
    fail_if_planned(["docker", *words], "here" if HOST is None else f"docker {HOST}")
    on_hosts = {"run": run, "logs": logs, "ps": ps, "container": inspect, "stop": stop, "rm": remove}
    verbs = {**on_hosts, "build": build, "push": push}
    if words[0] != "pull":
        verbs[words[0]](words)
