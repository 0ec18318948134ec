"""Paged attention: the interface for attention over keys and values stored in pages, and the backend per platform.

A backend owns the layout of a page. The caller decides which pages belong to which sequence: nothing here allocates.
Layers are unknown here: the engine folds them into the page index. `paged_attention_reference` is the reference for
the tests.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from simpo_pipeline.ops.paged_attention_cpu import CpuPagedAttention
from simpo_pipeline.ops.paged_attention_gpu import GpuPagedAttention
from simpo_pipeline.ops.paged_attention_tpu import TpuPagedAttention
from simpo_pipeline.ops.paged_batch import NewTokens, PagedSequences, Pages


@runtime_checkable
class PagedAttention(Protocol):
    """A backend that stores keys and values in pages and attends to them; equal and hashable by value.

    Every method is meant to be traced. Methods that return pages update the given pages in place if the program may
    donate them.
    """

    name: ClassVar[str]
    default_page_size: ClassVar[int]
    keys_per_block: ClassVar[int | None]
    """Page sizes that divide it give bitwise identical results. None if all page sizes do, or none is guaranteed to."""
    kv_heads_axis: ClassVar[int]
    """The axis of each array that can be sharded into whole key/value heads, each with its keys and its values."""

    def empty(self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike) -> Pages:
        """Return pages of zeros for keys and values of `dtype`."""
        ...

    def write(self, pages: Pages, tokens: NewTokens) -> Pages:
        """Write the tokens' keys and values into their slots.

        Tokens whose page is past the last one are dropped. Values that are not finite, or whose magnitude exceeds
        1e30, may be stored as 0.
        """
        ...

    def copy(self, pages: Pages, source: Int[Array, " n"], target: Int[Array, " n"]) -> Pages:
        """Copy page `source[i]` to page `target[i]`. All sources are read before any target is written.

        A copy whose target is past the last page is dropped. A source past the last page reads an arbitrary page.
        """
        ...

    def attend(
        self, q: Float[Array, "tokens heads head_size"], pages: Pages, sequences: PagedSequences
    ) -> Float[Array, "tokens heads head_size"]:
        """Attend from each query to the tokens of its sequence up to and including itself.

        The keys and values of the queries are already in the pages. Query head h reads key/value head
        `h // (heads // kv_heads)`. Scores and softmax are fp32; the result has q's dtype. Padding queries give zeros,
        except that single ones may give arbitrary values if a device kernel computes them.
        """
        ...


def backend_for(mesh: Mesh, axis: str) -> PagedAttention:
    """Return the backend for the devices of `mesh`.

    Key/value heads are sharded over the mesh axis `axis` if its size divides their number.

    Raises:
        ValueError: There is no backend for these devices.
    """
    platform = mesh.devices.flat[0].platform
    match platform:
        case "cpu":
            return CpuPagedAttention()
        case "gpu":
            return GpuPagedAttention(mesh, axis)
        case "tpu":
            return TpuPagedAttention(mesh, axis)
        case _:
            raise ValueError(f"paged attention supports cpu, gpu and tpu devices, got {platform}")
