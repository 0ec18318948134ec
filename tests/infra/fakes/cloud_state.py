"""What the fake programs know together: one file, in the folder that FAKE_CLOUD names.

`plan` is what a test wants to happen; the rest is what has happened so far. The fakes are started thousands of times,
so they import next to nothing: the file holds a Python literal, because importing `json` takes longer than the rest.
"""

import fcntl
import os
import sys

FOLDER = os.environ["FAKE_CLOUD"]


class locked_state:
    """The state, for this program alone; changes are written back."""

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
            with open(f"{FOLDER}/state", "w") as file:
                file.write(text)
        self._lock.close()


def note_call(program):
    """Remembers the words of this call."""
    with locked_state() as state:
        state["calls"].append({"at": os.environ.get("FAKE_HOST", ""), "words": [program, *sys.argv[1:]]})


def fault_for(words, place):
    """The fault that the plan has for this call, used up by being taken."""
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
    """Ends this program with the error that the plan has for this call."""
    fault = fault_for(words, place)
    if fault is not None:
        print(fault.get("err", "planned failure"), file=sys.stderr)
        sys.exit(fault.get("code", 1))


def option(words, name, default=""):
    """The word after a flag."""
    return words[words.index(name) + 1] if name in words else default


def lose_tpu(state):
    """The TPU is preempted."""
    state["request"] = {"state": "SUSPENDED"}
    state["node"]["state"] = "PREEMPTED"
    state["steps"] = []


def as_json(value):
    """Enough of JSON for what these programs say."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_json(key)}: {as_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
