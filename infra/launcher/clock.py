"""Time, as the launcher waits for it; tests bring their own."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time and lets it pass."""

    def now(self) -> float:
        """Seconds from some fixed moment."""
        ...

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Waits until the event is set, but no longer than so many seconds; returns whether it is set."""
        ...

    def sleep(self, seconds: float) -> None:
        """Waits."""
        ...


class WallClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
