"""How large an engine is made, from what it has to do and from the memory there is.

Every host must come to the same sizes: whoever calls this gives it the largest work and the least memory of all.
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

from simpo_pipeline.errors import CapacityError
from simpo_pipeline.inference.config import EngineConfig, EngineSizes, pages_for
from simpo_pipeline.inference.kv_cache import abstract_cache, bytes_per_device
from simpo_pipeline.inference.sequence import Request
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import abstract_llama
from simpo_pipeline.ops.paged_attention import backend_for
from simpo_pipeline.ops.paged_xla import KEYS_PER_BLOCK, QUERIES_PER_TILE

# More rows than this make a program hardly more efficient, and its cache and logits larger.
_MOST_SEQS = 256
# Larger chunks make fewer rounds, and programs that are hardly more efficient.
_MOST_CHUNK_TOKENS = 2048
# So that much work of nearly the same amount takes the same programs.
_CHUNK_STEP = 128


@dataclasses.dataclass(frozen=True)
class Work:
    """What an engine is to do, as far as its sizes depend on it.

    Attributes:
        num_requests: Samples to draw.
        longest_prompt: Tokens of the longest prompt.
        longest_total: Tokens of the longest sequence, prompt and generated together.
        total_tokens: The same of all sequences together.
    """

    num_requests: int
    longest_prompt: int
    longest_total: int
    total_tokens: int

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Work":
        """The work of these requests."""
        totals = [len(request.prompt_tokens) + request.sampling.max_tokens for request in requests]
        longest_prompt = max((len(request.prompt_tokens) for request in requests), default=0)
        return cls(len(requests), longest_prompt, max(totals, default=0), sum(totals))

    @classmethod
    def merged(cls, works: "Sequence[Work]") -> "Work":
        """Work as large as any of these in each respect."""
        return cls(*map(max, zip(*map(dataclasses.astuple, works), strict=True)))


def available_memory_bytes(mesh: Mesh, num_processes_here: int = 1) -> int:
    """Bytes that are free on each device of this process, on the fullest of them.

    Devices without memory of their own share the machine's, with those of the job's other processes on it.
    """
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in devices]
    if all(stats):
        return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return _machine_memory_bytes() // (max(1, len(devices)) * num_processes_here)


def size_engine(
    config: EngineConfig, model: LlamaConfig, dtype: DTypeLike, work: Work, mesh: Mesh, memory_bytes: int
) -> EngineSizes:
    """The sizes of an engine for `work` on devices with `memory_bytes` free on each.

    Raises: CapacityError if given sizes, or the least for this work, need more memory than there is.
    """
    attention = backend_for(mesh)
    page_size = config.page_size or attention.default_page_size
    max_seq_len = config.max_seq_len or min(model.max_seq_len, max(1, work.longest_total))
    sizes = EngineSizes(
        # More rows than requests would be computed for nobody.
        max_seqs=max(1, min(work.num_requests, config.max_seqs or _MOST_SEQS)),
        max_seq_len=max_seq_len,
        page_size=page_size,
        num_pages=1,
        prefill_chunk_tokens=config.prefill_chunk_tokens or _chunk_for(work),
        decode_steps_per_call=config.decode_steps_per_call,
    )
    budget = int(config.memory_utilization * memory_bytes)
    fixed = _bytes_without_cache(sizes, model, dtype, mesh)
    page_bytes = bytes_per_device(abstract_cache(model, sizes, dtype, mesh, attention))
    affordable = max(0, budget - fixed) // page_bytes
    least = config.num_pages or pages_for(min(max_seq_len, max(1, work.longest_total)), page_size)
    if affordable < least:
        _refuse(config, least, page_bytes, fixed, budget, memory_bytes)
    if config.num_pages is not None:
        return dataclasses.replace(sizes, num_pages=config.num_pages)
    most = min(
        sizes.max_seqs * sizes.pages_per_seq,
        # Each sequence's last page may be filled in part.
        pages_for(work.total_tokens, page_size) + work.num_requests if work.num_requests else 1,
    )
    return dataclasses.replace(sizes, num_pages=max(least, min(most, affordable)))


def _chunk_for(work: Work) -> int:
    most = pages_for(max(1, work.total_tokens), _CHUNK_STEP) * _CHUNK_STEP
    return min(most, _MOST_CHUNK_TOKENS)


def _bytes_without_cache(sizes: EngineSizes, model: LlamaConfig, dtype: DTypeLike, mesh: Mesh) -> int:
    """Per device: the weights, again for each layout that the engine makes, and what programs need while they run."""
    weights = with_shardings(abstract_llama(model, dtype), mesh, TENSOR_PARALLEL_RULES)
    platform = mesh.devices.flat[0].platform
    layouts = {"cpu": 1 + (jnp.dtype(dtype) == jnp.bfloat16), "gpu": 1}.get(platform, 0)
    num_tokens, heads_width = sizes.prefill_chunk_tokens + sizes.max_seqs, model.num_heads * model.head_dim
    of_a_layer = num_tokens * (4 * model.hidden_size + 3 * model.intermediate_size + 4 * heads_width)
    # Or, where it is more, what attention in plain XLA holds of a block of keys: for each tile of queries the keys and
    # values, for each query and head the scores and their exponentials.
    num_tiles = sizes.prefill_chunk_tokens // QUERIES_PER_TILE + sizes.max_seqs
    of_a_block = 2 * KEYS_PER_BLOCK * (num_tiles * model.num_kv_heads * model.head_dim + num_tokens * model.num_heads)
    of_attention = num_tokens * (2 * model.hidden_size + 4 * heads_width) + of_a_block
    activations = 4 * (max(of_a_layer, of_attention) + 2 * sizes.max_seqs * model.vocab_size)
    return (1 + layouts) * bytes_per_device(weights) + activations


def _refuse(config: EngineConfig, num_pages: int, page_bytes: int, fixed: int, budget: int, memory: int) -> NoReturn:
    needed = fixed + num_pages * page_bytes
    origin = "engine.num_pages asks for" if config.num_pages else "the longest sequence alone fills"
    raise CapacityError(
        f"the engine needs {_gib(needed)} on each device: {_gib(fixed)} for weights and programs, and {num_pages} "
        f"pages of {page_bytes} bytes, which {origin}; it may take {_gib(budget)} (engine.memory_utilization "
        f"{config.memory_utilization} of the {_gib(memory)} that are free). Ask for fewer pages or shorter sequences, "
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
