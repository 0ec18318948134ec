"""How long a program takes at least: what its mathematics needs, divided by what the machine can do.

Work is counted for the whole program over all its chips, from the model's shape alone; a multiply-add is two
operations. What the program does beside it (casts, norms, relayouts, padding) is not the mathematics' and not counted.
"""

import dataclasses
from collections.abc import Iterable

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.preflight.topology import Chip

Number = int | float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program has to do.

    Attributes:
        flops: Of the model: what its result needs.
        repeated_flops: Computed again in the backward pass instead of being kept.
        kernel_flops: Those of both that Pallas kernels do, of which the compiler gives no cycles.
        hbm_bytes: What has to pass through HBM: weights, caches, states and what is kept in between, each once per use.
        kernel_hbm_bytes: Of these what Pallas kernels read and write.
        scopes: Of the program's conditionals, those under these names take their true branch (`hlo.executed`).
    """

    flops: Number
    repeated_flops: Number = 0.0
    kernel_flops: Number = 0.0
    hbm_bytes: Number = 0.0
    kernel_hbm_bytes: Number = 0.0
    scopes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a machine takes at its peak; side by side, so the largest is the bound."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """What the program cannot be faster than."""
        return max(self.compute_seconds, self.hbm_seconds, self.link_seconds)


def roofline(work: Work, chip: Chip, num_chips: int, received_bytes: Number, num_links: int) -> Roofline:
    """The bound of `work` spread over chips, each of which receives so many bytes over so many links."""
    return Roofline(
        compute_seconds=(work.flops + work.repeated_flops) / num_chips / chip.peak_flops,
        hbm_seconds=work.hbm_bytes / num_chips / chip.hbm_bytes_per_second,
        link_seconds=received_bytes / (num_links * chip.link_bytes_per_second),
    )


def kernel_seconds(work: Work, chip: Chip, num_chips: int) -> float:
    """What Pallas kernels take at least, the slower of products and memory."""
    compute = work.kernel_flops / num_chips / chip.peak_flops
    return max(compute, work.kernel_hbm_bytes / num_chips / chip.hbm_bytes_per_second)


def layer_parameters(model: LlamaConfig) -> int:
    """Scalars in the matrices of one layer."""
    attention = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    return attention + 3 * model.hidden_size * model.intermediate_size


def kv_bytes_per_token(model: LlamaConfig, itemsize: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return model.num_layers * 2 * model.num_kv_heads * model.head_dim * itemsize


def train_work(
    model: LlamaConfig, num_rows: int, row_len: int, num_predictions: int, remat: str, *, kernel: bool
) -> Work:
    """One update: forward and backward over rows of causal attention, and Adam over fp32 states.

    `kernel` says that attention is a Pallas kernel. HBM: weights of each pass in bfloat16, 28 bytes a parameter for the
    update (read gradient, weight and two moments, write three), and each layer's input, kept and read again.
    """
    tokens = num_rows * row_len
    linear = 2 * layer_parameters(model) * tokens * model.num_layers
    # Scores and weighted values of the lower triangle: the mean query reads half of its row.
    attention = 4 * model.num_heads * model.head_dim * tokens * row_len / 2 * model.num_layers
    head = 2 * model.vocab_size * model.hidden_size * num_predictions
    passes = 3 + (remat == "full")
    parameters = model.num_parameters
    kept = tokens * model.hidden_size * 2 * (model.num_layers + 1)
    # The kernels of the backward pass, one for queries and one for keys and values, have 7 products, the forward one 2.
    kernel_flops = attention * (passes - 2 + 3.5) if kernel else 0.0
    qkvo = tokens * model.head_dim * 2 * (2 * model.num_heads + 2 * model.num_kv_heads) * model.num_layers
    return Work(
        flops=3 * (linear + attention + head),
        repeated_flops=(linear + attention) if remat == "full" else 0.0,
        kernel_flops=kernel_flops,
        hbm_bytes=2 * parameters * passes + 28 * parameters + 2 * kept,
        kernel_hbm_bytes=qkvo * (passes + 1) if kernel else 0.0,
    )


def generation_work(
    model: LlamaConfig,
    num_tokens: int,
    num_drawn: int,
    read_tokens: int,
    context: Number,
    itemsize: int,
    *,
    scopes: Iterable[str] = (),
) -> Work:
    """One pass over `num_tokens` tokens, of which `num_drawn` draw the next one, so that only these need logits.

    `read_tokens` keys and values are read from the cache in all, and each token attends to `context` of them.
    """
    matrices = layer_parameters(model) * model.num_layers
    table = model.vocab_size * model.hidden_size
    attention = 4 * model.num_heads * model.head_dim * num_tokens * context * model.num_layers
    kv = kv_bytes_per_token(model, itemsize)
    return Work(
        flops=2 * matrices * num_tokens + 2 * table * num_drawn + attention,
        kernel_flops=attention,
        hbm_bytes=itemsize * (matrices + (table if num_drawn else 0)) + kv * (read_tokens + num_tokens),
        kernel_hbm_bytes=kv * read_tokens,
        scopes=tuple(scopes),
    )
