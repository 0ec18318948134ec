"""Coordination service inside one process, for tests that use threads as processes."""

import threading

import pytest


class MemoryCoordination:
    """Key-value store that is shared by all threads with this object."""

    def __init__(self, count: int) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._count = count
        self._waiting: dict[str, int] = {}

    def put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, timeout_seconds: float) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, timeout_seconds)
            return self._values.get(key)

    def get_now(self, key: str) -> bytes | None:
        with self._changed:
            return self._values.get(key)

    def list(self, prefix: str) -> dict[str, bytes]:
        with self._changed:
            return {key: value for key, value in self._values.items() if key.startswith(prefix)}

    def delete(self, key: str) -> None:
        with self._changed:
            for known in [known for known in self._values if known == key or known.startswith(key.rstrip("/") + "/")]:
                del self._values[known]

    def barrier(self, name: str, timeout_seconds: float) -> bool:
        with self._changed:
            self._waiting[name] = self._waiting.get(name, 0) + 1
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._waiting[name] >= self._count, timeout_seconds)


@pytest.fixture
def make_coordination():
    """Return a function that makes a coordination service for a given number of processes."""
    return MemoryCoordination
