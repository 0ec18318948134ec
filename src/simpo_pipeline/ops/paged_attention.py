"""Attention of a batch of queries over keys and values that lie in pages: the interface, and who implements it where.

A backend owns how a page looks; which pages belong to whom is the caller's business: nothing here allocates, and
layers are unknown here (the engine folds them into the page index). `paged_attention_reference` is the oracle of the
tests.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from simpo_pipeline.distributed.mesh import MODEL_AXIS
from simpo_pipeline.ops.paged_attention_cpu import CpuPagedAttention
from simpo_pipeline.ops.paged_attention_gpu import GpuPagedAttention
from simpo_pipeline.ops.paged_attention_tpu import TpuPagedAttention


@runtime_checkable
class PagedAttention(Protocol):
    """One way to keep keys and values in pages and to attend to them; equal and hashable by value.

    Pages are a tuple of arrays with one row a page. Every method is to be traced; pages given to one that returns
    pages are updated in place where the program may donate them.
    """

    name: ClassVar[str]
    default_page_size: ClassVar[int]
    keys_per_block: ClassVar[int | None]
    """Page sizes that divide it give the same results to the bit; None where any does, or none is promised to."""
    kv_heads_axis: ClassVar[int]
    """The axis of each array that can be split over devices into whole key/value heads, keys and values of each."""

    def empty(
        self, num_pages: int, page_size: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """Pages of zeros, for keys and values that are given as `dtype`."""
        ...

    def write(
        self,
        pages: tuple[Shaped[Array, "pages ..."], ...],
        k: Float[Array, "tokens kv_heads head_size"],
        v: Float[Array, "tokens kv_heads head_size"],
        page: Int[Array, " tokens"],
        slot: Int[Array, " tokens"],
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """Puts token t's key and value into slot `slot[t]` of page `page[t]`; a page past the last one drops them.

        Values that are not finite, or beyond 1e30, may be stored as 0.
        """
        ...

    def copy(
        self,
        pages: tuple[Shaped[Array, "pages ..."], ...],
        source: Int[Array, " n"],
        target: Int[Array, " n"],
    ) -> tuple[Shaped[Array, "pages ..."], ...]:
        """Copies page `source[i]` over page `target[i]`, all read before any is written.

        A target past the last page drops the copy; a source there reads any page.
        """
        ...

    def attend(
        self,
        q: Float[Array, "tokens heads head_size"],
        pages: tuple[Shaped[Array, "pages ..."], ...],
        page_table: Int[Array, "seqs pages_per_seq"],
        query_starts: Int[Array, " seqs_and_end"],
        kv_lens: Int[Array, " seqs"],
        *,
        num_single: int,
    ) -> Float[Array, "tokens heads head_size"]:
        """Each query attends to the tokens of its sequence up to and including itself.

        Sequence s owns `q[query_starts[s]:query_starts[s + 1]]`: its last tokens, whose keys and values are in its
        pages already. The first `num_single` sequences have one query each, so `query_starts[s]` = s up to and with
        s = `num_single`; one of them with `kv_lens[s]` = 0 is no sequence. The others have any number, 0 included.

        Token p of sequence s lies in page `page_table[s, p // page_size]`, slot `p % page_size`, for p < kv_lens[s];
        the rest of its row may hold any page. Query head h reads key/value head `h // (heads // kv_heads)`. Scores
        and softmax are fp32; the result has q's dtype. Queries of no sequence give zeros, but
        single ones may give anything where a kernel of the device attends.
        """
        ...


def backend_for(mesh: Mesh, axis: str = MODEL_AXIS) -> PagedAttention:
    """The backend for the devices of `mesh`; key/value heads are split over its axis `axis` where that divides them.

    Raises:
        ValueError: There is no backend for such devices.
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
            raise ValueError(f"paged attention runs on cpu, gpu and tpu devices, got {platform}")
