"""Live values: objects that are passed from step to step inside one process and are never written to storage.

A store keeps each value from the end of its producer until the end of its last consumer. A borrower may only use the
object while it runs. A taker becomes the owner of the object, which is then no longer in the store.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from simpo_pipeline.errors import LiveEdgeError
from simpo_pipeline.executor.planning.graph import Step
from simpo_pipeline.executor.run import Live
from simpo_pipeline.executor.step import LiveUse


@dataclass
class _Held:
    live: Live
    waiting: set[Step] = field(default_factory=set[Step])


class LiveStore:
    """Live values of this process, by producer."""

    def __init__(self) -> None:
        self._held: dict[Step, _Held] = {}
        self._taken: dict[Step, list[Live]] = {}

    def held(self) -> frozenset[Step]:
        """Return the producers whose values are in the store."""
        return frozenset(self._held)

    def publish(self, producer: Step, live: Live, consumers: Iterable[Step]) -> None:
        """Keep a value until all `consumers` have ended. If there are none, free it immediately."""
        self._held[producer] = _Held(live, set(consumers))
        self._free_if_unneeded(producer)

    def give(self, producer: Step, consumer: Step, use: LiveUse) -> Any:
        """Return the value to one consumer. A taken value leaves the store.

        Raises:
            LiveEdgeError: the value is not in the store, or it cannot be taken before other consumers have ended.
        """
        if producer not in self._held:
            raise LiveEdgeError(f"There is no live value of {producer.name!r} for {consumer.name!r} to {use}.")
        held = self._held[producer]
        if use is LiveUse.TAKE:
            others = held.waiting - {consumer}
            if others:
                names = ", ".join(sorted(other.name for other in others))
                raise LiveEdgeError(
                    f"{consumer.name!r} cannot take the live value of {producer.name!r}, "
                    f"which is still needed by {names}."
                )
            del self._held[producer]
            self._taken.setdefault(consumer, []).append(held.live)
        return held.live.value

    def consumer_ended(self, consumer: Step, *, failed: bool) -> None:
        """Free the values that only this consumer still needed. If it failed, also free the values that it took."""
        for live in self._taken.pop(consumer, []):
            if failed:
                _free(live)
        for producer in [key for key, held in self._held.items() if consumer in held.waiting]:
            self._held[producer].waiting.discard(consumer)
            self._free_if_unneeded(producer)

    def free_all(self) -> None:
        """Free every value at the end of a run."""
        while self._held:
            _free(self._held.popitem()[1].live)

    def _free_if_unneeded(self, producer: Step) -> None:
        if not self._held[producer].waiting:
            _free(self._held.pop(producer).live)


def _free(live: Live) -> None:
    if live.free is not None:
        live.free()
