"""The device programs of one engine, compiled ahead of time for fixed shapes, and their selection for each round."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from simpo_pipeline.distributed.mesh import MODEL_AXIS, place
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.inference.batches import DecodeBatch, decode_batch, prefill_batch
from simpo_pipeline.inference.config import EngineSizes, pages_for
from simpo_pipeline.inference.forward import (
    SampledTokens,
    decode,
    lay_out,
    lay_out_by_layer,
    prefill,
    prefill_and_decode,
)
from simpo_pipeline.inference.kv_cache import KVCache, abstract_cache, bytes_per_device, empty_cache
from simpo_pipeline.inference.packing import pack, unpack
from simpo_pipeline.inference.sampling import UNSPLIT, VocabSplit
from simpo_pipeline.inference.scheduler import Round
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, LlamaLayers, MergedLayers, UnstackedLlama, abstract_llama
from simpo_pipeline.ops.paged_attention import backend_for

# Programs with fewer elements than this round differently, because XLA's CPU backend uses other kernels for them. Above
# it, tests show that each row's result is bitwise independent of the program's number of rows and of whether the
# program is prefill or decode. On CPUs, tokens therefore depend neither on the batch, nor on preemption, nor on the
# engine's sizes.
_SMALLEST_PROGRAM = 4096
# With excess precision, XLA omits roundings to bfloat16 between fused operations, different ones in each program.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}
# Limit for the windows of weights. For a decode step of an 8B model on 4 chips of a v5p, the compiler's estimate is 5%
# lower than with its default of 16 MiB.
_TPU_DECODE_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": 65536}
# Number of pages copied per program call; more pages take several calls.
_PAGES_PER_COPY = 16


class EngineWeights(NamedTuple):
    """The weights in the layouts that the engine's programs expect."""

    stacked: Llama  # for programs with prefill chunks
    by_layer: Llama | UnstackedLlama  # for decode programs


class EnginePrograms:
    """All device programs of an engine, for one model, one set of sizes and one mesh."""

    def __init__(
        self, model: LlamaConfig, sizes: EngineSizes, mesh: Mesh, programs: Programs, dtype: DTypeLike
    ) -> None:
        self._model = model
        self._sizes = sizes
        self._programs = programs
        self._dtype = dtype
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._split = self._vocab_split(mesh)
        num_devices = mesh.shape[TENSOR_PARALLEL_RULES["kv_heads"]]
        self._head_parts = num_devices if model.num_kv_heads % num_devices == 0 else None
        self._decode_options = {
            **COMPILER_OPTIONS,
            **(_TPU_DECODE_OPTIONS if mesh.devices.flat[0].platform == "tpu" else {}),
        }
        attention = backend_for(mesh, MODEL_AXIS)
        given = with_shardings(abstract_llama(model, dtype), mesh, TENSOR_PARALLEL_RULES)
        self.weights_bytes = bytes_per_device(given)
        self._weights = EngineWeights(given, given)
        self._lay_out = self._compile_lay_out(given, mesh)
        self._cache = abstract_cache(model, sizes, dtype, mesh, attention)
        self.cache_bytes = bytes_per_device(self._cache)
        self._empty_cache = self._compile(
            "empty_cache",
            functools.partial(empty_cache, model, sizes, dtype, attention),
            out_shardings=_placement(self._cache),
        )
        self._copy_pages = self._compile_copy()
        rows = program_sizes(sizes.max_seqs, model)
        chunks = program_sizes(sizes.prefill_chunk_tokens, model, parts=(16, 4))
        self._decode = {size: self._compile_decode(size) for size in rows}
        self._mixed_rows = rows[-1]
        self._mixed = {size: self._compile_mixed(size, self._mixed_rows) for size in chunks}
        # The same for rounds in which a row has `LogitAdjustments`.
        self._adjusted_decode: dict[int, Program] = {}
        self._adjusted_mixed: dict[int, Program] = {}
        # Prefill-only rounds with few tokens are rare; they use a mixed program without decode rows.
        self._prefill_tokens = chunks[-1]
        self._prefill = self._compile_prefill(self._prefill_tokens)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Padded numbers of prompt tokens that programs are compiled for, smallest first."""
        return tuple(self._mixed)

    @property
    def all(self) -> list[Program]:
        """Every program that updates the cache."""
        decode, mixed = self._decode | self._adjusted_decode, self._mixed | self._adjusted_mixed
        return [self._copy_pages, *decode.values(), *mixed.values(), self._prefill]

    @property
    def temporary_bytes(self) -> int:
        """Bytes per device in addition to weights and cache, including the layers' second layout."""
        second_layout = self._lay_out.memory_bytes.outputs if self._lay_out is not None else 0
        return second_layout + max(
            each.memory_bytes.temporary + each.memory_bytes.outputs - each.memory_bytes.aliased for each in self.all
        )

    def compile_adjusted(self) -> bool:
        """Compile the programs for rounds in which a row has `LogitAdjustments`, which few jobs need.

        Returns whether they were compiled now; a second call does nothing.
        """
        if self._adjusted_decode:
            return False
        self._adjusted_mixed = {
            size: self._compile_mixed(size, self._mixed_rows, adjusts_logits=True) for size in self._mixed
        }
        self._adjusted_decode = {size: self._compile_decode(size, adjusts_logits=True) for size in self._decode}
        return True

    def lay_out(self, weights: Llama) -> EngineWeights:
        """Convert the weights to the programs' layouts; the layers are copied where that makes programs faster."""
        if self._lay_out is None:
            return EngineWeights(weights, weights)
        return _laid_out(weights, *self._lay_out(weights.layers))

    def empty_cache(self) -> KVCache:
        """Return a cache without tokens."""
        return self._empty_cache()

    def run(
        self, weights: EngineWeights, cache: KVCache, current: Round, step: np.uint32
    ) -> tuple[KVCache, SampledTokens | None]:
        """Launch a round and return immediately; the devices fill the returned arrays asynchronously."""
        cache = self._copied(cache, current)
        chunks, rows = current.chunks, current.decoding
        adjusts = any(sequence.request.sampling.adjusts_logits for sequence in rows)
        decode = self._adjusted_decode if adjusts else self._decode
        mixed = self._adjusted_mixed if adjusts else self._mixed
        if not chunks:
            batch = self._decode_batch(current, _smallest_fitting(len(rows), decode), adjusts_logits=adjusts)
            return decode[batch.tokens.shape[0]](weights.by_layer, cache, self._placed(pack((batch, step))))
        size = _smallest_fitting(sum(chunk.num_tokens for chunk in chunks), self._mixed)
        prefills = prefill_batch(chunks, self._sizes, size)
        if not rows and size == self._prefill_tokens:
            return self._prefill(weights.stacked, cache, self._placed(pack((prefills,)))), None
        batch = self._decode_batch(current, self._mixed_rows, adjusts_logits=adjusts)
        return mixed[size](weights.stacked, cache, self._placed(pack((prefills, batch, step))))

    def _decode_batch(self, current: Round, num_rows: int, *, adjusts_logits: bool) -> DecodeBatch:
        return decode_batch(current, self._sizes, num_rows, self._model.vocab_size, adjusts_logits=adjusts_logits)

    def _copied(self, cache: KVCache, current: Round) -> KVCache:
        for start in range(0, len(current.copies), _PAGES_PER_COPY):
            pairs = current.copies[start : start + _PAGES_PER_COPY]
            table = np.full((2, _PAGES_PER_COPY), self._sizes.num_pages, np.int32)
            table[0] = 0
            table[:, : len(pairs)] = np.array(pairs, np.int32).T
            cache = self._copy_pages(cache, self._placed(table))
        return cache

    def _vocab_split(self, mesh: Mesh) -> VocabSplit:
        """Return how `TENSOR_PARALLEL_RULES` shards the logits."""
        parts = mesh.shape[TENSOR_PARALLEL_RULES["vocab"]]
        if parts == 1 or self._model.vocab_size % parts:
            return UNSPLIT
        return VocabSplit(parts, lambda array: jax.lax.with_sharding_constraint(array, self._replicated))

    def _compile_lay_out(self, given: Llama, mesh: Mesh) -> Program | None:
        """Set the layer layout that is fastest on these devices, and compile the program that converts to it."""
        match mesh.devices.flat[0].platform:
            case "cpu":
                function = lay_out
            case "gpu":
                function = functools.partial(lay_out_by_layer, parts=self._head_parts)
            case _:
                return None
        both = with_shardings(jax.eval_shape(function, given.layers), mesh, TENSOR_PARALLEL_RULES)
        self._weights = _laid_out(given, *both)
        return self._compile("lay_out", function, given.layers, out_shardings=_placement(both))

    def _compile_copy(self) -> Program:
        return self._compile(
            "copy_pages",
            lambda cache, pairs: cache.copy(pairs[0], pairs[1]),
            self._cache,
            self._abstract(np.zeros((2, _PAGES_PER_COPY), np.int32)),
            donate_argnums=(0,),
            out_shardings=_placement(self._cache),
        )

    def _compile_prefill(self, num_tokens: int) -> Program:
        return self._compile_round(
            f"prefill_{num_tokens}",
            functools.partial(prefill, dtype=self._dtype),
            self._weights.stacked,
            (prefill_batch((), self._sizes, num_tokens),),
            out_shardings=_placement(self._cache),
        )

    def _compile_mixed(self, num_tokens: int, num_rows: int, *, adjusts_logits: bool = False) -> Program:
        batch = self._decode_batch(_EMPTY_ROUND, num_rows, adjusts_logits=adjusts_logits)
        return self._compile_round(
            f"prefill_{num_tokens}_decode_{num_rows}{'_adjusted' if adjusts_logits else ''}",
            functools.partial(prefill_and_decode, dtype=self._dtype, split=self._split),
            self._weights.stacked,
            (prefill_batch((), self._sizes, num_tokens), batch, np.uint32(0)),
            out_shardings=(_placement(self._cache), self._replicated),
        )

    def _compile_decode(self, num_rows: int, *, adjusts_logits: bool = False) -> Program:
        batch = self._decode_batch(_EMPTY_ROUND, num_rows, adjusts_logits=adjusts_logits)
        return self._compile_round(
            f"decode_{num_rows}{'_adjusted' if adjusts_logits else ''}",
            functools.partial(
                decode,
                max_steps=self._sizes.decode_steps_per_call,
                dtype=self._dtype,
                split=self._split,
                head_parts=self._head_parts or 1,
            ),
            self._weights.by_layer,
            (batch, np.uint32(0)),
            out_shardings=(_placement(self._cache), self._replicated),
            options=self._decode_options,
        )

    def _compile_round(
        self, name: str, function: Callable[..., Any], weights: Any, batches: tuple[Any, ...], **how: Any
    ) -> Program:
        """Compile a program of weights, cache and packed batches with the shapes of `batches`."""
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batches)

        def run(weights: Any, cache: KVCache, words: jax.Array) -> Any:
            return function(weights, cache, *unpack(words, like))

        words = self._abstract(pack(batches))
        return self._compile(name, run, weights, self._cache, words, donate_argnums=(1,), **how)

    def _compile(
        self,
        name: str,
        function: Callable[..., Any],
        *abstract_args: Any,
        options: Mapping[str, bool | int] = COMPILER_OPTIONS,
        **how: Any,
    ) -> Program:
        return self._programs.compile(f"engine_{name}", function, *abstract_args, compiler_options=options, **how)

    def _abstract(self, array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._replicated)

    def _placed(self, array: np.ndarray) -> jax.Array:
        return place(array, self._replicated)


_EMPTY_ROUND = Round((), (), 1, 1, ())


def program_sizes(most: int, model: LlamaConfig, parts: tuple[int, ...] = (4,)) -> list[int]:
    """Return the row counts to compile for, smallest first.

    These are the largest count, at least `most`, and its fractions 1 / `parts` that are not too small. `parts` is in
    decreasing order; 4 stands for a quarter.
    """
    smallest = max(8, pages_for(_SMALLEST_PROGRAM, model.hidden_size))
    largest = max(most, smallest)
    return [*(largest // part for part in parts if largest // part >= smallest), largest]


def _smallest_fitting(size: int, programs: dict[int, Program]) -> int:
    return min(rows for rows in programs if rows >= size)


def _laid_out(
    weights: Llama, stacked: LlamaLayers | None, by_layer: tuple[LlamaLayers, ...] | tuple[MergedLayers, ...]
) -> EngineWeights:
    rest = (weights.final_norm, weights.head, weights.config)
    return EngineWeights(
        weights if stacked is None else Llama(weights.embedding, stacked, *rest),
        UnstackedLlama(weights.embedding, by_layer, *rest),
    )


def _placement(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
