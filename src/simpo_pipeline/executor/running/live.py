"""Live values: objects that pass from step to step inside one process and are never written.

A store holds each value from the end of its producer to the end of its last consumer. Borrowers get the object and give
it back; a taker becomes its owner, and the store forgets it.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from simpo_pipeline.errors import LiveEdgeError
from simpo_pipeline.executor.step import ExecutorStep, LiveUse

Step = ExecutorStep[Any]
DigestT = TypeVar("DigestT", str, str | None)


@dataclass(frozen=True, eq=False)
class Live:
    """What a step function returns to publish a live value."""

    value: Any
    digest: str | None = None
    """Names the value's content; recorded at the first run and compared at every replay."""
    free: Callable[[], None] | None = None
    """Releases what the value holds (device buffers) when no step will use it again. Not called once it is taken,
    because the taker owns it then, unless the taker fails."""


@dataclass
class _Held:
    live: Live
    waiting: set[Step] = field(default_factory=set[Step])


class LiveStore:
    """The live values of this process, by producer."""

    def __init__(self) -> None:
        self._held: dict[Step, _Held] = {}
        self._taken: dict[Step, list[Live]] = {}

    def held(self) -> frozenset[Step]:
        """The producers whose values are here."""
        return frozenset(self._held)

    def publish(self, producer: Step, live: Live, consumers: Iterable[Step]) -> None:
        """Hold a value until each of `consumers` has ended; with none, it is freed at once."""
        self._held[producer] = _Held(live, set(consumers))
        self._free_if_unneeded(producer)

    def give(self, producer: Step, consumer: Step, use: LiveUse) -> Any:
        """The value, for one consumer; after a take it is here no longer.

        Raises:
            LiveEdgeError: the value is not here, or other consumers have yet to end before it may be taken.
        """
        if producer not in self._held:
            raise LiveEdgeError(f"No live value is held for {producer.name!r}, which {consumer.name!r} would {use}.")
        held = self._held[producer]
        if use is LiveUse.TAKE:
            others = held.waiting - {consumer}
            if others:
                names = ", ".join(sorted(other.name for other in others))
                raise LiveEdgeError(
                    f"{consumer.name!r} cannot take the live value of {producer.name!r} before {names} end."
                )
            del self._held[producer]
            self._taken.setdefault(consumer, []).append(held.live)
        return held.live.value

    def consumer_ended(self, consumer: Step, *, failed: bool) -> None:
        """Free what waited for this consumer alone; what a failed consumer had taken is freed too."""
        for live in self._taken.pop(consumer, []):
            if failed:
                _free(live)
        for producer in [key for key, held in self._held.items() if consumer in held.waiting]:
            self._held[producer].waiting.discard(consumer)
            self._free_if_unneeded(producer)

    def free_all(self) -> None:
        """Free every value, at the end of a run."""
        while self._held:
            _free(self._held.popitem()[1].live)

    def _free_if_unneeded(self, producer: Step) -> None:
        if not self._held[producer].waiting:
            _free(self._held.pop(producer).live)


def joint_digest(digests: Sequence[DigestT]) -> DigestT | str:
    """One digest for the values of all processes: theirs if they are equal, else one over all in order."""
    if len(set(digests)) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(str(digest) for digest in digests).encode()).hexdigest()


def _free(live: Live) -> None:
    if live.free is not None:
        live.free()
