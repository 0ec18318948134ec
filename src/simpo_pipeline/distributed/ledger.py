"""The ledger: the ordered record of the device programs that this process launched.

A pod compares program k of host A with program k of host B. CPU and GPU do not, so this record is what proves there
that every process launched the same multi-device programs in the same order. It knows names and fingerprints, nothing
of what the programs compute.
"""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: which program, and on how many devices it ran."""

    program: str
    fingerprint: str
    num_devices: int


class Ledger:
    """Launches in the order in which they were made."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []

    def record(self, launch: Launch) -> None:
        """Appends one launch; called just before the program reaches the devices."""
        self._launches.append(launch)

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Every launch so far, single-device ones included."""
        return tuple(self._launches)

    @property
    def multi_device_launches(self) -> tuple[Launch, ...]:
        """The launches that peers must match, in order."""
        return tuple(launch for launch in self._launches if launch.num_devices > 1)

    def digest(self) -> str:
        """SHA-256 over the order and fingerprints of the multi-device launches."""
        lines = (f"{launch.program} {launch.fingerprint}\n" for launch in self.multi_device_launches)
        return hashlib.sha256("".join(lines).encode()).hexdigest()
