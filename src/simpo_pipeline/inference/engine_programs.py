"""The device programs of one engine, compiled ahead for fixed shapes; which one a round takes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from simpo_pipeline.distributed.mesh import place
from simpo_pipeline.distributed.programs import Program, Programs
from simpo_pipeline.inference.batches import DecodeBatch, decode_batch, prefill_batch
from simpo_pipeline.inference.config import EngineSizes, pages_for
from simpo_pipeline.inference.forward import Drawn, decode, lay_out, lay_out_by_layer, prefill, prefill_and_decode
from simpo_pipeline.inference.kv_cache import KVCache, abstract_cache, bytes_per_device, empty_cache
from simpo_pipeline.inference.packing import pack, unpack
from simpo_pipeline.inference.sampling import UNSPLIT, VocabSplit
from simpo_pipeline.inference.scheduler import Round
from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.model.sharding import TENSOR_PARALLEL_RULES, with_shardings
from simpo_pipeline.model.transformer import Llama, LlamaLayers, MergedLayers, UnstackedLlama, abstract_llama
from simpo_pipeline.ops.paged_attention import backend_for

# Programs of fewer elements than this are rounded otherwise: XLA's CPU backend takes other kernels for them. Above it
# the tests find every row's result independent, to the bit, of how many rows its program has, and of whether that
# program is prefill or decode; so on CPUs a token depends neither on the batch nor on a preemption nor on the engine's
# sizes.
_SMALLEST_PROGRAM = 4096
# Else XLA leaves out roundings to bfloat16 between operations that it fuses, others in each program.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}
# Windows of weights may be so large: of a decode step of an 8B model on 4 chips of a v5p the compiler then expects 5%
# less than with its own 16 MiB.
_TPU_DECODE_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": 65536}
# Pages copied in one program; more are copied in several.
_PAGES_PER_COPY = 16


class EngineWeights(NamedTuple):
    """The weights as an engine's programs take them."""

    stacked: Llama  # programs over chunks
    by_layer: Llama | UnstackedLlama  # decode


class EnginePrograms:
    """All that an engine launches, for one model at one set of sizes on one mesh."""

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
        attention = backend_for(mesh)
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
        # Few tokens with nobody who draws beside them are rare, and are served by a mixed program without rows.
        self._prefill_tokens = chunks[-1]
        self._prefill = self._compile_prefill(self._prefill_tokens)

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Prompt tokens that a round's program computes, whether there are so many or not; smallest first."""
        return tuple(self._mixed)

    @property
    def all(self) -> list[Program]:
        """Every program that works on the cache."""
        return [self._copy_pages, *self._decode.values(), *self._mixed.values(), self._prefill]

    @property
    def temporary_bytes(self) -> int:
        """What the programs need on each device beside weights and cache, the layers' second layout included."""
        relaid = self._lay_out.memory_bytes.outputs if self._lay_out is not None else 0
        return relaid + max(
            each.memory_bytes.temporary + each.memory_bytes.outputs - each.memory_bytes.aliased for each in self.all
        )

    def lay_out(self, weights: Llama) -> EngineWeights:
        """The weights as the programs take them; the layers are copied where that makes programs faster."""
        if self._lay_out is None:
            return EngineWeights(weights, weights)
        return _laid_out(weights, *self._lay_out(weights.layers))

    def empty_cache(self) -> KVCache:
        """A cache without tokens."""
        return self._empty_cache()

    def run(
        self, weights: EngineWeights, cache: KVCache, current: Round, step: np.uint32
    ) -> tuple[KVCache, Drawn | None]:
        """Launches a round; returns at once, with arrays that the devices are still to fill."""
        cache = self._copied(cache, current)
        chunks, rows = current.chunks, current.decoding
        if not chunks:
            batch = self._decode_batch(current, _smallest_holding(len(rows), self._decode))
            return self._decode[batch.tokens.shape[0]](weights.by_layer, cache, self._placed(pack((batch, step))))
        size = _smallest_holding(sum(chunk.num_tokens for chunk in chunks), self._mixed)
        prefills = prefill_batch(chunks, self._sizes, size)
        if not rows and size == self._prefill_tokens:
            return self._prefill(weights.stacked, cache, self._placed(pack((prefills,)))), None
        batch = self._decode_batch(current, self._mixed_rows)
        return self._mixed[size](weights.stacked, cache, self._placed(pack((prefills, batch, step))))

    def _decode_batch(self, current: Round, num_rows: int) -> DecodeBatch:
        return decode_batch(current, self._sizes, num_rows, self._model.vocab_size)

    def _copied(self, cache: KVCache, current: Round) -> KVCache:
        for start in range(0, len(current.copies), _PAGES_PER_COPY):
            pairs = current.copies[start : start + _PAGES_PER_COPY]
            table = np.full((2, _PAGES_PER_COPY), self._sizes.num_pages, np.int32)
            table[0] = 0
            table[:, : len(pairs)] = np.array(pairs, np.int32).T
            cache = self._copy_pages(cache, self._placed(table))
        return cache

    def _vocab_split(self, mesh: Mesh) -> VocabSplit:
        """How the logits of `TENSOR_PARALLEL_RULES` lie."""
        parts = mesh.shape[TENSOR_PARALLEL_RULES["vocab"]]
        if parts == 1 or self._model.vocab_size % parts:
            return UNSPLIT
        return VocabSplit(parts, lambda array: jax.lax.with_sharding_constraint(array, self._replicated))

    def _compile_lay_out(self, given: Llama, mesh: Mesh) -> Program | None:
        """Makes the other programs take the layers as these devices run them fast; the program that lays them out."""
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

    def _compile_mixed(self, num_tokens: int, num_rows: int) -> Program:
        return self._compile_round(
            f"prefill_{num_tokens}_decode_{num_rows}",
            functools.partial(prefill_and_decode, dtype=self._dtype, split=self._split),
            self._weights.stacked,
            (prefill_batch((), self._sizes, num_tokens), self._decode_batch(_NOTHING, num_rows), np.uint32(0)),
            out_shardings=(_placement(self._cache), self._replicated),
        )

    def _compile_decode(self, num_rows: int) -> Program:
        return self._compile_round(
            f"decode_{num_rows}",
            functools.partial(
                decode,
                max_steps=self._sizes.decode_steps_per_call,
                dtype=self._dtype,
                split=self._split,
                head_parts=self._head_parts or 1,
            ),
            self._weights.by_layer,
            (self._decode_batch(_NOTHING, num_rows), np.uint32(0)),
            out_shardings=(_placement(self._cache), self._replicated),
            options=self._decode_options,
        )

    def _compile_round(
        self, name: str, function: Callable[..., Any], weights: Any, batches: tuple[Any, ...], **how: Any
    ) -> Program:
        """A program of weights, cache and packed batches of the shapes of these."""
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


_NOTHING = Round((), (), 1, 1, ())


def program_sizes(most: int, model: LlamaConfig, parts: tuple[int, ...] = (4,)) -> list[int]:
    """Row counts to compile for, smallest first: these parts of the most, where they are not too small, and the most.

    `parts` is in falling order: 4 for a quarter.
    """
    smallest = max(8, pages_for(_SMALLEST_PROGRAM, model.hidden_size))
    largest = max(most, smallest)
    return [*(largest // part for part in parts if largest // part >= smallest), largest]


def _smallest_holding(size: int, programs: dict[int, Program]) -> int:
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
