"""Engine sizes, derived from the workload and the available memory.

All hosts must derive the same sizes, so callers pass the maximum workload and the minimum memory over all hosts.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from simpo_pipeline.distributed.mesh import MODEL_AXIS
from simpo_pipeline.errors import CapacityError
from simpo_pipeline.inference.config import MAX_LOGIT_BIAS, EngineConfig, EngineSizes, pages_for
from simpo_pipeline.inference.kv_cache import abstract_cache, bytes_per_device
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.ops.paged_attention import backend_for
from simpo_pipeline.ops.paged_xla import KEYS_PER_BLOCK, QUERIES_PER_TILE

# More rows hardly make a program more efficient, but need more memory for the cache and logits.
_MAX_SEQS = 256
# Larger chunks need fewer rounds, but their programs are hardly more efficient.
_MAX_CHUNK_TOKENS = 2048
# Chunk sizes are multiples of this, so that workloads of similar size use the same programs.
_CHUNK_STEP = 128
# Arrays as large as the logits that sampling needs at once, after the layers. XLA's backend for CPUs allocates four of
# them (logits, weights, and their copies in blocks) and smaller ones.
_LOGITS_BUFFERS = 5


@dataclasses.dataclass(frozen=True)
class Workload:
    """Workload of an engine, as far as the engine sizes depend on it.

    Attributes:
        num_requests: Number of samples to generate.
        longest_prompt: Number of tokens of the longest prompt.
        longest_total: Number of tokens of the longest sequence, prompt and `max_tokens` together.
        total_tokens: Sum of the same over all sequences.
        adjusts_logits: Whether a request needs the programs with `LogitAdjustments`.
    """

    num_requests: int
    longest_prompt: int
    longest_total: int
    total_tokens: int
    adjusts_logits: bool = False

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Workload":
        """Return the workload of these requests."""
        totals = [len(request.prompt_tokens) + request.sampling.max_tokens for request in requests]
        longest_prompt = max((len(request.prompt_tokens) for request in requests), default=0)
        adjusts_logits = any(request.sampling.adjusts_logits for request in requests)
        return cls(len(requests), longest_prompt, max(totals, default=0), sum(totals), adjusts_logits)

    @classmethod
    def merged(cls, works: "Sequence[Workload]") -> "Workload":
        """Return the maximum of each field over `works`."""
        return cls(*map(max, zip(*map(dataclasses.astuple, works), strict=True)))


def available_memory_bytes(mesh: Mesh, num_processes_here: int = 1) -> int:
    """Return the free bytes per device of this process: the minimum over its devices.

    Devices without their own memory share the host's memory equally, including the devices of the job's other processes
    on the same host; `num_processes_here` counts all of these processes.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in devices]
    if all(stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return _machine_memory_bytes() // (max(1, len(devices)) * num_processes_here)


def size_engine(
    config: EngineConfig, model: LlamaConfig, dtype: DTypeLike, work: Workload, mesh: Mesh, memory_bytes: int
) -> EngineSizes:
    """Return engine sizes for `work` on devices with `memory_bytes` free on each.

    Raises:
        CapacityError: The requested sizes, or the minimum sizes for this workload, need more memory than is available.
    """
    attention = backend_for(mesh, MODEL_AXIS)
    page_size = config.page_size or attention.default_page_size
    max_seq_len = config.max_seq_len or min(model.max_seq_len, max(1, work.longest_total))
    sizes = EngineSizes(
        # More rows than requests would only be padding.
        max_seqs=max(1, min(work.num_requests, config.max_seqs or _MAX_SEQS)),
        max_seq_len=max_seq_len,
        page_size=page_size,
        num_pages=1,
        prefill_chunk_tokens=config.prefill_chunk_tokens or _chunk_for(work),
        decode_steps_per_call=config.decode_steps_per_call,
    )
    budget = int(config.memory_utilization * memory_bytes)
    fixed = _bytes_without_cache(sizes, model, dtype, mesh)
    if work.adjusts_logits:
        fixed += _bytes_of_adjustments(sizes, model)
    page_bytes = bytes_per_device(abstract_cache(model, sizes, dtype, mesh, attention))
    affordable_pages = max(0, budget - fixed) // page_bytes
    min_pages = config.num_pages or pages_for(min(max_seq_len, max(1, work.longest_total)), page_size)
    if affordable_pages < min_pages:
        _refuse(config, min_pages, page_bytes, fixed, budget, memory_bytes)
    if config.num_pages is not None:
        return dataclasses.replace(sizes, num_pages=config.num_pages)
    max_pages = min(
        sizes.max_seqs * sizes.pages_per_seq,
        # Each sequence's last page may be partially filled.
        pages_for(work.total_tokens, page_size) + work.num_requests if work.num_requests else 1,
    )
    return dataclasses.replace(sizes, num_pages=max(min_pages, min(max_pages, affordable_pages)))


def _chunk_for(work: Workload) -> int:
    num_tokens = pages_for(max(1, work.total_tokens), _CHUNK_STEP) * _CHUNK_STEP
    return min(num_tokens, _MAX_CHUNK_TOKENS)


def _bytes_without_cache(sizes: EngineSizes, model: LlamaConfig, dtype: DTypeLike, mesh: Mesh) -> int:
    """Return the bytes per device of the weights, once more for each converted layout, and of the activations."""
    weights = with_shardings(abstract_llama(model, dtype), mesh, TENSOR_PARALLEL_RULES)
    platform = mesh.devices.flat[0].platform
    layouts = {"cpu": 1 + (jnp.dtype(dtype) == jnp.bfloat16), "gpu": 1}.get(platform, 0)
    num_tokens, heads_width = sizes.prefill_chunk_tokens + sizes.max_seqs, model.num_heads * model.head_dim
    layer_size = num_tokens * (4 * model.hidden_size + 3 * model.intermediate_size + 4 * heads_width)
    # The alternative, if larger, is attention in plain XLA over one block of keys: keys and values per tile of queries,
    # and scores and their exponentials per query and head.
    num_tiles = sizes.prefill_chunk_tokens // QUERIES_PER_TILE + sizes.max_seqs
    block_size = 2 * KEYS_PER_BLOCK * (num_tiles * model.num_kv_heads * model.head_dim + num_tokens * model.num_heads)
    attention_size = num_tokens * (2 * model.hidden_size + 4 * heads_width) + block_size
    logits_size = sizes.max_seqs * model.vocab_size
    activations = 4 * max(max(layer_size, attention_size) + 2 * logits_size, _LOGITS_BUFFERS * logits_size)
    return (1 + layouts) * bytes_per_device(weights) + activations


def _bytes_of_adjustments(sizes: EngineSizes, model: LlamaConfig) -> int:
    """Return the bytes that programs with `LogitAdjustments` add: counts of tokens, and inputs, packed and unpacked."""
    inputs_size = 2 * (2 * MAX_LOGIT_BIAS + sizes.max_seq_len)
    return 4 * sizes.max_seqs * (model.vocab_size + inputs_size)


def _refuse(config: EngineConfig, num_pages: int, page_bytes: int, fixed: int, budget: int, memory: int) -> NoReturn:
    needed = fixed + num_pages * page_bytes
    origin = "requested by engine.num_pages" if config.num_pages else "the minimum for the longest sequence"
    raise CapacityError(
        f"the engine needs {_gib(needed)} on each device: {_gib(fixed)} for weights and programs, and {num_pages} "
        f"pages of {page_bytes} bytes ({origin}); it may use {_gib(budget)} (engine.memory_utilization "
        f"{config.memory_utilization} of {_gib(memory)} of free memory). Request fewer pages or shorter sequences, "
        "or use more devices"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _machine_memory_bytes() -> int:
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
