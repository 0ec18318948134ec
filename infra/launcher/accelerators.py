"""TPU types: the number of chips and hosts of a type such as v5p-32, and the names that Google Cloud uses."""

import dataclasses
import re

from launcher.errors import BadUsage

CHIPS_PER_HOST = 4
# Where a type's size counts chips, a slice with at most this many chips has a single host.
_CHIPS_OF_ONE_LARGE_HOST = 8


@dataclasses.dataclass(frozen=True)
class TpuGeneration:
    """A TPU generation.

    Attributes:
        name: The part of an accelerator type before the dash.
        cores_per_chip: Cores per chip. The number after the dash counts cores; newer generations count a chip as one.
        runtime_version: The image of a TPU VM.
        gke_accelerator: The label of GKE's nodes; "" if GKE does not offer this generation.
        dimensions: Number of dimensions of a slice's topology.
    """

    name: str
    cores_per_chip: int
    runtime_version: str
    gke_accelerator: str
    dimensions: int


GENERATIONS = {
    generation.name: generation
    for generation in (
        TpuGeneration("v2", 2, "tpu-ubuntu2204-base", "", 2),
        TpuGeneration("v3", 2, "tpu-ubuntu2204-base", "", 2),
        TpuGeneration("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice", 3),
        TpuGeneration("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2),
        TpuGeneration("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice", 3),
        TpuGeneration("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice", 2),
    )
}
_ALIASES = {"v5e": "v5litepod"}


@dataclasses.dataclass(frozen=True)
class TpuType:
    """A slice: a TPU generation and a size."""

    generation: TpuGeneration
    size: int

    @property
    def name(self) -> str:
        """The accelerator type, as Google Cloud spells it."""
        return f"{self.generation.name}-{self.size}"

    @property
    def chips(self) -> int:
        """Number of chips in the slice."""
        return self.size // self.generation.cores_per_chip

    @property
    def hosts(self) -> int:
        """Number of hosts in the slice; one process runs on each."""
        is_one_host = self.generation.cores_per_chip == 1 and self.chips <= _CHIPS_OF_ONE_LARGE_HOST
        return 1 if is_one_host else max(1, self.chips // CHIPS_PER_HOST)

    @property
    def topology(self) -> str:
        """The slice's topology on GKE, such as 2x2x4.

        The sides are powers of two, as equal as possible, in ascending order (descending for up to 4 chips).
        """
        sides = [1] * self.generation.dimensions
        product = 1
        while product < self.chips:
            smallest = min(range(len(sides)), key=lambda i: sides[i])
            sides[smallest] *= 2
            product *= 2
        return "x".join(map(str, sorted(sides) if self.chips > CHIPS_PER_HOST else sorted(sides, reverse=True)))


def parse_tpu_type(text: str) -> TpuType:
    """Parse a TPU type such as `v5p-32`.

    Raises:
        BadUsage: the generation is unknown, or it has no slice of that size.
    """
    matched = re.fullmatch(r"([a-z0-9]+)-(\d+)", text)
    kind = _ALIASES.get(matched[1], matched[1]) if matched else ""
    if matched is None or kind not in GENERATIONS:
        kinds = ", ".join([*GENERATIONS, *_ALIASES])
        raise BadUsage(f"--tpu_type {text!r} is unknown; write KIND-SIZE, such as v5p-32; kinds: {kinds}")
    tpu_type = TpuType(GENERATIONS[kind], int(matched[2]))
    chips = tpu_type.chips
    if chips < 1 or chips & (chips - 1) or tpu_type.size % tpu_type.generation.cores_per_chip:
        counted = "chips" if tpu_type.generation.cores_per_chip == 1 else "cores, two per chip"
        raise BadUsage(
            f"--tpu_type {text!r}: the size counts {counted}, and the number of chips must be a power of two"
        )
    return tpu_type
