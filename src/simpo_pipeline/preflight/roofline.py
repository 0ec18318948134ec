"""The roofline of a program: a lower bound on its time, from its work and the peak rates of the machine.

Work is counted for the whole program over all its chips, from the model's shape alone. A multiply-add counts as two
operations. Everything that the mathematics does not require (casts, norms, relayouts, padding) is not counted.
"""

import dataclasses
from collections.abc import Iterable

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.preflight.topology import Chip

Number = int | float


@dataclasses.dataclass(frozen=True)
class ProgramWork:
    """The work of a program.

    Attributes:
        flops: Model FLOPs: the operations that the result requires.
        repeated_flops: Operations that the backward pass recomputes instead of keeping their results.
        kernel_flops: The part of both that runs in Pallas kernels, for which the compiler gives no cycles.
        hbm_bytes: Bytes that have to pass through HBM: weights, caches, states and kept activations, once per use.
        kernel_hbm_bytes: The part of `hbm_bytes` that Pallas kernels read and write.
        scopes: Names of scopes whose conditionals take their true branch (`hlo.executed`).
    """

    flops: Number
    repeated_flops: Number = 0.0
    kernel_flops: Number = 0.0
    hbm_bytes: Number = 0.0
    kernel_hbm_bytes: Number = 0.0
    scopes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each part of a machine takes at its peak rate. The parts overlap, so the largest is the bound."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: float

    @property
    def seconds(self) -> float:
        """Lower bound on the time of the program."""
        return max(self.compute_seconds, self.hbm_seconds, self.link_seconds)


def roofline(work: ProgramWork, chip: Chip, num_chips: int, received_bytes: Number, num_links: int) -> Roofline:
    """Return the bound of `work` over `num_chips`, each receiving `received_bytes` over `num_links` links."""
    return Roofline(
        compute_seconds=(work.flops + work.repeated_flops) / num_chips / chip.peak_flops,
        hbm_seconds=work.hbm_bytes / num_chips / chip.hbm_bytes_per_second,
        link_seconds=received_bytes / (num_links * chip.link_bytes_per_second),
    )


def kernel_seconds(work: ProgramWork, chip: Chip, num_chips: int) -> float:
    """Return a lower bound on the time of Pallas kernels: the slower of matmuls and HBM traffic."""
    compute = work.kernel_flops / num_chips / chip.peak_flops
    return max(compute, work.kernel_hbm_bytes / num_chips / chip.hbm_bytes_per_second)


def layer_parameters(model: LlamaConfig) -> int:
    """Return the number of parameters in the matrices of one layer."""
    attention = model.hidden_size * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    return attention + 3 * model.hidden_size * model.intermediate_size


def kv_bytes_per_token(model: LlamaConfig, itemsize: int) -> int:
    """Return the bytes of the keys and values of one token in all layers."""
    return model.num_layers * 2 * model.num_kv_heads * model.head_dim * itemsize


def train_work(
    model: LlamaConfig, num_rows: int, row_len: int, num_predictions: int, remat: str, *, kernel: bool
) -> ProgramWork:
    """Return the work of one update: forward and backward over rows with causal attention, and Adam with fp32 states.

    `kernel` is whether attention is a Pallas kernel. HBM traffic consists of the bfloat16 weights of each pass, 28
    bytes per parameter for the update (read gradient, weight and two moments, write three), and each layer's input,
    which is kept and read again.
    """
    tokens = num_rows * row_len
    linear = 2 * layer_parameters(model) * tokens * model.num_layers
    # Scores and weighted values of the lower triangle: on average, a query reads half of its row.
    attention = 4 * model.num_heads * model.head_dim * tokens * row_len / 2 * model.num_layers
    head = 2 * model.vocab_size * model.hidden_size * num_predictions
    passes = 3 + (remat == "full")
    parameters = model.num_parameters
    kept = tokens * model.hidden_size * 2 * (model.num_layers + 1)
    # The backward kernels, one for queries and one for keys and values, have 7 matmuls; the forward kernel has 2.
    kernel_flops = attention * (passes - 2 + 3.5) if kernel else 0.0
    qkvo = tokens * model.head_dim * 2 * (2 * model.num_heads + 2 * model.num_kv_heads) * model.num_layers
    return ProgramWork(
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
) -> ProgramWork:
    """Return the work of one pass over `num_tokens` tokens.

    Only the `num_drawn` tokens that sample a next token need logits. The pass reads the keys and values of
    `read_tokens` tokens from the cache in total. Each token attends to `context` of them.
    """
    matrices = layer_parameters(model) * model.num_layers
    table = model.vocab_size * model.hidden_size
    attention = 4 * model.num_heads * model.head_dim * num_tokens * context * model.num_layers
    kv = kv_bytes_per_token(model, itemsize)
    return ProgramWork(
        flops=2 * matrices * num_tokens + 2 * table * num_drawn + attention,
        kernel_flops=attention,
        hbm_bytes=itemsize * (matrices + (table if num_drawn else 0)) + kv * (read_tokens + num_tokens),
        kernel_hbm_bytes=kv * read_tokens,
        scopes=tuple(scopes),
    )
