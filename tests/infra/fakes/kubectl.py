"""A fake kubectl with one namespace and at most one JobSet, which runs through the planned attempts."""

import sys
import time

from cloud_state import as_json, fail_if_planned, locked_state, note_call, option

USUAL = [{"suspended": 1, "pending": 1, "end": "Completed"}]


def refuse(text):
    sys.exit(f"Error from server {text}")


def attempt_of(state):
    attempts = state["plan"].get("attempts", USUAL)
    return attempts[min(state["attempt"], len(attempts) - 1)]


def create(state):
    import json  # slow to import, and rarely needed

    manifest = json.load(sys.stdin)
    if manifest["kind"] == "Secret":
        state["secret"] = manifest
        return
    if state["jobset"] is not None:
        refuse("(AlreadyExists): jobsets.jobset.x-k8s.io already exists")
    state.update(jobset=manifest, attempt=0, looks=0, read=[])


def hosts_of(state):
    return state["jobset"]["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]


def get_jobset(state):
    if state["jobset"] is None:
        refuse('(NotFound): jobsets.jobset.x-k8s.io "job" not found')
    plan = attempt_of(state)
    state["looks"] += 1
    conditions = []
    if len(state["read"]) >= hosts_of(state) or plan.get("ended"):
        if plan["end"] == "restart":
            state.update(attempt=state["attempt"] + 1, looks=0, read=[])
        else:
            conditions = [{"type": plan["end"], "status": "True", "message": plan.get("message", "")}]
    spec = {**state["jobset"]["spec"], "suspend": state["looks"] <= plan.get("suspended", 0)}
    metadata = {**state["jobset"]["metadata"], "uid": "u-1"}
    print(
        as_json(
            {"metadata": metadata, "spec": spec, "status": {"restarts": state["attempt"], "conditions": conditions}}
        )
    )


def pod(state, host):
    plan = attempt_of(state)
    behaviour = plan.get("pods", {}).get(str(host), {})
    name = f"{state['jobset']['metadata']['name']}-slice-0-{host}-{state['attempt']}"
    container = {}
    if state["looks"] <= plan.get("suspended", 0) + plan.get("pending", 0):
        phase = "Pending"
        container = {"state": {"waiting": {"reason": plan.get("waiting", "ContainerCreating")}}}
    elif name in state["read"]:
        code = behaviour.get("code", 0)
        phase = "Failed" if code else "Succeeded"
        container = {"state": {"terminated": {"exitCode": code, "reason": behaviour.get("reason", "Error")}}}
    else:
        phase = "Running"
    labels = {"batch.kubernetes.io/job-completion-index": str(host)}
    status = {"phase": phase, "containerStatuses": [container] if container else []}
    return {"metadata": {"name": name, "labels": labels}, "status": status}


def get_pods(state):
    is_there = state["jobset"] is not None and state["looks"] > attempt_of(state).get("suspended", 0)
    print(as_json({"items": [pod(state, host) for host in range(hosts_of(state))] if is_there else []}))


def logs(words):
    name = words[words.index("logs") + 1]
    host = name.split("-")[-2]
    with locked_state() as state:
        behaviour = attempt_of(state).get("pods", {}).get(host, {})
    print("\n".join(behaviour.get("lines", [f"hello from {host}"])), flush=True)
    if "--follow" in words:
        time.sleep(behaviour.get("seconds", 0))
        with locked_state() as state:
            state["read"] = sorted({*state["read"], name})


def main(words):
    note_call("kubectl")
    fail_if_planned(words, "here")
    namespace = option(words, "--namespace")
    assert namespace, "every call names its namespace"
    if "logs" in words:
        logs(words)
        return
    with locked_state() as state:
        if "create" in words:
            create(state)
        elif "jobset" in words and "get" in words:
            get_jobset(state)
        elif "pods" in words:
            get_pods(state)
        elif "delete" in words:
            state.update({words[words.index("delete") + 1]: None})
