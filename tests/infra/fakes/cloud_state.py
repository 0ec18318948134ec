"""The shared state of the fake programs: one file in the folder that FAKE_CLOUD names.

`plan` contains the events that a test wants; the rest records past events. The fakes are started thousands of times,
so they import almost nothing: the file is a Python literal, because importing `json` takes longer than the rest.
"""

import fcntl
import os
import sys

FOLDER = os.environ["FAKE_CLOUD"]


class locked_state:
    """Lock the state for this program, and write changes back on exit."""

    def __enter__(self):
        self._lock = open(f"{FOLDER}/lock", "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with open(f"{FOLDER}/state") as file:
            self._text = file.read()
        self._state = eval(self._text)
        return self._state

    def __exit__(self, *error):
        text = repr(self._state)
        if text != self._text:
            # The program may be killed at any time, and must not leave half a state.
            with open(f"{FOLDER}/state.new", "w") as file:
                file.write(text)
            os.replace(f"{FOLDER}/state.new", f"{FOLDER}/state")
        self._lock.close()


def note_call(program):
    """Record the words of this call."""
    with locked_state() as state:
        state["calls"].append({"at": os.environ.get("FAKE_HOST", ""), "words": [program, *sys.argv[1:]]})


def fault_for(words, place):
    """Return the planned fault for this call, and use it up."""
    text = " ".join(words)
    with locked_state() as state:
        for fault in state["plan"].get("faults", []):
            fits = fault["match"] in text and fault.get("at", place) == place
            if fits and fault.get("skip", 0) > 0:
                fault["skip"] -= 1
            elif fits and fault.get("times", 1) > 0:
                fault["times"] = fault.get("times", 1) - 1
                return fault
    return None


def fail_if_planned(words, place):
    """Exit with the planned error for this call, if there is one."""
    fault = fault_for(words, place)
    if fault is not None:
        print(fault.get("err", "planned failure"), file=sys.stderr)
        sys.exit(fault.get("code", 1))


def option(words, name, default=""):
    """Return the word after a flag."""
    return words[words.index(name) + 1] if name in words else default


def lose_tpu(state):
    """Preempt the TPU."""
    state["request"] = {"state": "SUSPENDED"}
    state["node"]["state"] = "PREEMPTED"
    state["steps"] = []


def as_json(value):
    """Serialize the subset of JSON that these programs print."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(key)}: {as_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
