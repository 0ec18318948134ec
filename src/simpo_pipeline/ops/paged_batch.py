"""The arguments of paged attention: pages, the tokens to write to them, and the sequences whose queries read them."""

import equinox as eqx
from jaxtyping import Array, Float, Int, Shaped

# One or more arrays with one row per page. The backend owns their layout.
Pages = tuple[Shaped[Array, "pages ..."], ...]


class NewTokens(eqx.Module):
    """Keys and values of tokens, and where to write them: token t goes into slot `slot[t]` of page `page[t]`."""

    k: Float[Array, "tokens kv_heads head_size"]
    v: Float[Array, "tokens kv_heads head_size"]
    page: Int[Array, " tokens"]
    slot: Int[Array, " tokens"]


class PagedSequences(eqx.Module):
    """Sequences whose keys and values are in pages, and whose last tokens are the queries of a batch.

    Sequence s owns the queries `q[query_starts[s]:query_starts[s + 1]]`; queries that no sequence owns are padding. The
    first `num_single` sequences have one query each, so `query_starts[s]` = s for s <= `num_single`; those with
    `kv_lens[s]` = 0 are padding. Each of the other sequences has any number of queries, including 0.

    Token p of sequence s is in page `page_table[s, p // page_size]`, slot `p % page_size`, for p < `kv_lens[s]`. The
    rest of the sequence's page table row may name any page.
    """

    page_table: Int[Array, "seqs pages_per_seq"]
    query_starts: Int[Array, " seqs_and_end"]
    kv_lens: Int[Array, " seqs"]
    """Number of tokens of each sequence, including its queries."""
    num_single: int = eqx.field(static=True)

    def single(self) -> "PagedSequences":
        """Return the first `num_single` sequences."""
        num_single = self.num_single
        return PagedSequences(
            self.page_table[:num_single], self.query_starts[: num_single + 1], self.kv_lens[:num_single], num_single
        )

    def chunks(self) -> "PagedSequences":
        """Return the other sequences, for a batch that starts with their queries."""
        num_single = self.num_single
        query_starts = self.query_starts[num_single:] - num_single
        return PagedSequences(self.page_table[num_single:], query_starts, self.kv_lens[num_single:], num_single=0)
