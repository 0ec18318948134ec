"""TPU types: how many chips and hosts a name such as v5p-32 stands for, and what Google Cloud calls its parts."""

import dataclasses
import re

from launcher.errors import BadUsage

CHIPS_PER_HOST = 4
# Types with so few chips have one host for all of them.
_CHIPS_OF_ONE_LARGE_HOST = 8


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    Attributes:
        name: As in an accelerator type, before the dash.
        cores_per_chip: The number after the dash counts cores; on newer kinds a chip counts as one.
        runtime_version: The image of a TPU VM.
        gke_accelerator: The label of GKE's nodes; "" where GKE has none.
        dimensions: Of a slice's topology.
    """

    name: str
    cores_per_chip: int
    runtime_version: str
    gke_accelerator: str
    dimensions: int


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("v2", 2, "tpu-ubuntu2204-base", "", 2),
        Generation("v3", 2, "tpu-ubuntu2204-base", "", 2),
        Generation("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
        Generation("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
        Generation("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
        Generation("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
    )
}
_ALIASES = {"v5e": "v5litepod"}


@dataclasses.dataclass(frozen=True)
class TpuType:
    """A slice: a kind of TPU and its size."""

    generation: Generation
    size: int

    @property
    def name(self) -> str:
        """As Google Cloud spells it."""
        return f"{self.generation.name}-{self.size}"

    @property
    def chips(self) -> int:
        """Of the whole slice."""
        return self.size // self.generation.cores_per_chip

    @property
    def hosts(self) -> int:
        """Machines with chips of the slice; one process runs on each."""
        is_one_host = self.generation.cores_per_chip == 1 and self.chips <= _CHIPS_OF_ONE_LARGE_HOST
        return 1 if is_one_host else max(1, self.chips // CHIPS_PER_HOST)

    @property
    def topology(self) -> str:
        """The slice's shape on GKE: sides that are as equal as powers of two can be, the longest last."""
        sides = [1] * self.generation.dimensions
        product = 1
        while product < self.chips:
            smallest = min(range(len(sides)), key=lambda i: sides[i])
            sides[smallest] *= 2
            product *= 2
        return "x".join(map(str, sorted(sides) if self.chips > CHIPS_PER_HOST else sorted(sides, reverse=True)))


def parse_tpu_type(text: str) -> TpuType:
    """The slice that a name such as `v5p-32` stands for.

    Raises:
        BadUsage: the kind is unknown, or there is no slice of that size.
    """
    matched = re.fullmatch(r"([a-z0-9]+)-(\d+)", text)
    kind = _ALIASES.get(matched[1], matched[1]) if matched else ""
    if matched is None or kind not in GENERATIONS:
        kinds = ", ".join([*GENERATIONS, *_ALIASES])
        raise BadUsage(f"--tpu_type {text!r} is unknown; write KIND-SIZE, such as v5p-32, with a kind of {kinds}")
    tpu_type = TpuType(GENERATIONS[kind], int(matched[2]))
    chips = tpu_type.chips
    if chips < 1 or chips & (chips - 1) or tpu_type.size % tpu_type.generation.cores_per_chip:
        counted = "chips" if tpu_type.generation.cores_per_chip == 1 else "cores, two a chip"
        raise BadUsage(f"--tpu_type {text!r}: the number counts {counted}, and chips come in powers of two")
    return tpu_type
