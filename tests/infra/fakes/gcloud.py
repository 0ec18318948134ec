"""A fake gcloud with one TPU, whose hosts are folders. A real shell runs the scripts that arrive over ssh."""

import os
import sys

from cloud_state import FOLDER, as_json, fail_if_planned, fault_for, locked_state, note_call, option

HOSTS = {"v5p-8": 1, "v5p-16": 2, "v5p-32": 4}
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: Resource was not found"
# The progress of a request, one step per query: the state of the request and that of the TPU.
USUAL_LIFE = [["WAITING_FOR_RESOURCES", None], ["PROVISIONING", "CREATING"], ["ACTIVE", "READY"]]


def refuse(text):
    sys.exit(f"ERROR: (gcloud) {text}")


def create(words):
    with locked_state() as state:
        if state["request"] is not None or state["node"] is not None:
            refuse("ALREADY_EXISTS: there is one of that name")
        lives = state["plan"].get("lives", [])
        made = state["made"] = state["made"] + 1
        state["steps"] = lives[made - 1] if made <= len(lives) else USUAL_LIFE
        state["request"] = {"state": "ACCEPTED"}
        state["wanted"] = option(words, "--accelerator-type")


def step(state):
    if not state["steps"]:
        return
    request, node, *more = state["steps"].pop(0)
    state["request"] = None if request is None else {"state": request}
    if more and state["request"] is not None:
        state["request"]["reason"] = more[0]
    kind = state["wanted"]
    state["node"] = None if node is None else {"state": node, "health": "HEALTHY", "type": kind, "hosts": HOSTS[kind]}


def describe_request():
    with locked_state() as state:
        step(state)
        request = state["request"]
    if request is None:
        sys.exit(NOT_FOUND)
    failed = {"failedData": {"error": {"code": 8, "message": request["reason"]}}} if "reason" in request else {}
    print(as_json({"name": "r", "state": {"state": request["state"], **failed}}))


def describe_node():
    with locked_state() as state:
        node = state["node"]
    if node is None:
        sys.exit(NOT_FOUND)
    kind = f"projects/p/locations/z/acceleratorTypes/{node['type']}"
    endpoints = [{"ipAddress": f"10.0.0.{host}"} for host in range(node["hosts"])]
    print(as_json({k: node[k] for k in ("state", "health")} | {"acceleratorType": kind, "networkEndpoints": endpoints}))


def delete(is_request):
    with locked_state() as state:
        if (state["request"] if is_request else state["node"]) is None:
            sys.exit(NOT_FOUND)
        state.update(request=None, node=None, steps=[])
        state["deleted"] += 1


def environment_of(host):
    with locked_state() as state:
        made = state["made"]
    home = f"{FOLDER}/tpu_{made}/host_{host}"
    os.makedirs(home, exist_ok=True)
    return {**os.environ, "HOME": home, "FAKE_HOST": host, "FAKE_LIFE": str(made)}


def shell(command, host, has_input):
    import subprocess  # slow to import, and rarely needed

    stdin = None if has_input else subprocess.DEVNULL
    return subprocess.Popen(["sh", "-c", command], env=environment_of(host), stdin=stdin, stdout=subprocess.PIPE)


def pass_on(running, lines=None):
    assert running.stdout is not None
    for number, line in enumerate(running.stdout):
        if lines is not None and number >= lines:
            sys.stdout.buffer.write(line[: len(line) // 2])
            break
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
    else:
        return running.wait()
    sys.stdout.flush()
    running.kill()
    return running.wait()


def ssh(words):
    command, host = option(words, "--command"), option(words, "--worker")
    with locked_state() as state:
        is_ready = state["node"] is not None and state["node"]["state"] == "READY"
    if not is_ready:
        refuse("the TPU is in a state in which it cannot be reached")
    fault = fault_for([command], f"host {host}") or {"kind": ""}
    kind = fault["kind"]
    if kind == "refuse":
        sys.exit(255)
    if kind == "fail":
        print(fault["err"], file=sys.stderr)
        sys.exit(fault["code"])
    if kind == "cut":
        pass_on(shell(command, host, True), fault["lines"])
        sys.exit(255)
    if kind == "repeat":
        # Like gcloud when its connection breaks: run the command again, without the input.
        pass_on(shell(command, host, not fault.get("early")), fault.get("lines"))
        sys.exit(pass_on(shell(command, host, False)))
    if kind == "delete":
        delete(is_request=True)
        sys.exit(255)
    os.execvpe("sh", ["sh", "-c", command], environment_of(host))


def main(words):
    note_call("gcloud")
    fail_if_planned(words, "here") if "ssh" not in words else None
    if words[:2] == ["config", "get-value"]:
        with locked_state() as state:
            print(state["plan"].get("config", {}).get(words[2], "(unset)"))
    elif "images" in words:
        with locked_state() as state:
            is_there = words[words.index("describe") + 1] in state["pushed"]
        None if is_there else refuse("NOT_FOUND: image")
    elif "queued-resources" in words:
        verb = next(word for word in ("create", "describe", "delete") if word in words)
        {"create": lambda: create(words), "describe": describe_request, "delete": lambda: delete(True)}[verb]()
    elif "tpu-vm" in words:
        verb = next(word for word in ("ssh", "describe", "delete") if word in words)
        {"ssh": lambda: ssh(words), "describe": describe_node, "delete": lambda: delete(False)}[verb]()
    elif words[:2] not in (["auth", "configure-docker"], ["container", "clusters"]):
        refuse(f"unrecognized arguments: {words}")
