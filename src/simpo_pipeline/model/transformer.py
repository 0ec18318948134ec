"""The Llama forward pass on named axes: parameters, layers, logits.

The caller decides how tokens attend to each other: `transform` runs over any leading axes and passes each layer's
queries, keys and values to an `attend` function. So training (whole sequences) and generation (a paged cache) share one
implementation. This module does not know about meshes, file formats or tokenizers.

Weights have the layout [out, in], as in Hugging Face's files. It makes XLA's CPU matmuls over few rows twice as fast.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from simpo_pipeline.model.config import LlamaConfig
from simpo_pipeline.ops.attention import ATTENDED, Segments, causal_attention
from simpo_pipeline.ops.linear import TransposedMatmul, linear, matmul, transposed_matmul
from simpo_pipeline.ops.norm import rms_norm
from simpo_pipeline.ops.rope import (
    Rotation,
    apply_rope,
    apply_rope_by_matmul,
    llama3_scaled_frequencies,
    rope_frequencies,
    rotation,
)

# The `jax.checkpoint` name of the matmul results that remat="products" keeps for the backward pass.
_MATMUL = "matmul"

# (layer, q [*lead, heads, head_size], k and v [*lead, kv_heads, head_size], state) -> (out like q, state).
# Rope has been applied. `state` is any pytree, carried from layer to layer.
Attend = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]


def _identity(array: NamedArray) -> NamedArray:
    return array


def attend_whole_sequences(
    layer: Int[Array, ""],
    q: Float[Array, "batch seq heads head_size"],
    k: Float[Array, "batch seq kv_heads head_size"],
    v: Float[Array, "batch seq kv_heads head_size"],
    state: Segments | None,
) -> tuple[Float[Array, "batch seq heads head_size"], Segments | None]:
    """Attend causally within each row's segments: the `attend` of training, for leading axes (sequence, position).

    `state` is None if each row is one segment (padding may follow it).
    """
    del layer
    return causal_attention(q, k, v, state), state


class Placement(NamedTuple):
    """Sharding of arrays over a mesh during computation.

    All fields but the last four are functions that return their argument with a sharding constraint.
    """

    weight: Callable[[NamedArray], NamedArray]  # each weight, immediately before its use
    hidden: Callable[[NamedArray], NamedArray]  # hidden states, after the embedding, and those that predict
    # Hidden states within the layers: after attention, and after each layer.
    residual: Callable[[NamedArray], NamedArray] = _identity
    # The unembedding, if it is processed in chunks of the vocabulary, and the hidden states [tokens, embed] for it.
    unembedding: Callable[[NamedArray], NamedArray] = _identity
    predicting: Callable[[Array], Array] = lambda hidden: hidden
    # The attention over whole sequences, for this sharding.
    attend: Attend = attend_whole_sequences
    # Returns the matmul that computes a weight's gradient, from the out axes and the in axes of the weight.
    gradient: Callable[[Sequence[Axis], Sequence[Axis]], TransposedMatmul] = lambda _out, _in: transposed_matmul
    # The matmul that computes the gradient of a chunk of the unembedding, for `predicting` hidden states.
    unembedding_gradient: TransposedMatmul = transposed_matmul
    # Whether heads stay a separate axis of the matmuls before and after attention. TPUs then write and read arrays with
    # the heads first, as their kernel requires.
    keeps_heads: bool = False


# No constraints: the compiler chooses. Suitable for one device and for generation.
ANYWHERE = Placement(weight=_identity, hidden=_identity)


class LlamaLayers(eqx.Module):
    """The parameters of all layers, stacked: the first axis of every leaf is "layers"."""

    attn_norm: NamedArray  # layers embed
    wq: NamedArray  # layers heads head_size embed
    wk: NamedArray  # layers kv_heads head_size embed
    wv: NamedArray  # layers kv_heads head_size embed
    wo: NamedArray  # layers embed heads head_size
    mlp_norm: NamedArray  # layers embed
    w_gate: NamedArray  # layers mlp embed
    w_up: NamedArray  # layers mlp embed
    w_down: NamedArray  # layers embed mlp


class Llama(eqx.Module):
    """All parameters of a model. `head` is None if the embedding is also the unembedding."""

    embedding: NamedArray  # vocab embed
    layers: LlamaLayers
    final_norm: NamedArray  # embed
    head: NamedArray | None  # vocab embed
    config: LlamaConfig = eqx.field(static=True)


class MergedLayers(eqx.Module):
    """The stacked parameters of all layers, for matmuls over few tokens: weights with the same input are one matrix."""

    attn_norm: NamedArray  # layers embed
    wqkv: NamedArray  # layers parts rows embed; see `merged_layers`
    wo: NamedArray  # layers embed heads; the axis heads includes head_size
    mlp_norm: NamedArray  # layers embed
    w_gate: NamedArray  # layers mlp embed
    w_up: NamedArray  # layers mlp embed
    w_down: NamedArray  # layers embed mlp


class MergedLlama(eqx.Module):
    """All parameters of a model with `MergedLayers`; see `merged`."""

    embedding: NamedArray  # vocab embed
    layers: MergedLayers
    final_norm: NamedArray  # embed
    head: NamedArray | None  # vocab embed
    config: LlamaConfig = eqx.field(static=True)


class UnstackedLlama(eqx.Module):
    """All parameters of a model with separate arrays for each layer; see `unstacked`."""

    embedding: NamedArray  # vocab embed
    layers: tuple[LlamaLayers, ...] | tuple[MergedLayers, ...]  # without the axis "layers"
    final_norm: NamedArray  # embed
    head: NamedArray | None  # vocab embed
    config: LlamaConfig = eqx.field(static=True)


AnyLlama = Llama | MergedLlama | UnstackedLlama
AnyLayers = TypeVar("AnyLayers", LlamaLayers, MergedLayers)


def init_llama(config: LlamaConfig, key: PRNGKeyArray | UInt32[Array, "2"]) -> Llama:
    """Return random fp32 parameters: normal with standard deviation `initializer_range`; norm scales are 1."""
    axes = _axes(config)
    matrices = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
    tables: tuple[str, ...] = ("embedding", "head", *matrices)
    keys = jax.random.split(key, len(tables))

    def normal(name: str) -> NamedArray:
        return hax.random.normal(keys[tables.index(name)], axes[name]) * config.initializer_range

    def ones(name: str) -> NamedArray:
        return hax.ones(axes[name], dtype=jnp.float32)

    return Llama(
        embedding=normal("embedding"),
        layers=LlamaLayers(
            **{name: normal(name) for name in matrices}, attn_norm=ones("attn_norm"), mlp_norm=ones("mlp_norm")
        ),
        final_norm=ones("final_norm"),
        head=None if config.tie_word_embeddings else normal("head"),
        config=config,
    )


def abstract_llama(config: LlamaConfig, dtype: DTypeLike) -> Llama:
    """Return the parameter tree with a `jax.ShapeDtypeStruct` of `dtype` in place of each array."""
    axes = _axes(config)

    def shaped(name: str) -> NamedArray:
        return NamedArray(jax.ShapeDtypeStruct(tuple(axis.size for axis in axes[name]), dtype), axes[name])  # pyright: ignore[reportArgumentType]

    return Llama(
        embedding=shaped("embedding"),
        layers=LlamaLayers(**{name: shaped(name) for name in LlamaLayers.__dataclass_fields__}),
        final_norm=shaped("final_norm"),
        head=None if config.tie_word_embeddings else shaped("head"),
        config=config,
    )


def transform(
    model: AnyLlama,
    tokens: NamedArray,
    positions: NamedArray,
    *,
    attend: Attend,
    state: Any,
    dtype: DTypeLike,
    remat: str = "none",
    placement: Placement = ANYWHERE,
) -> tuple[NamedArray, Any]:
    """Run all layers and the final norm.

    Parameters of any float dtype are cast to `dtype` layer by layer. Norms and rope are computed in fp32.

    Args:
        model: The parameters.
        tokens: int32 token ids over any leading axes, whose names must differ from the model's own axes.
        positions: int32 positions over the same axes.
        attend: Computes attention in each layer.
        state: Any pytree, passed to `attend` and carried from layer to layer.
        dtype: The dtype of the computation and of the result.
        remat: What each layer keeps for a backward pass. "none" keeps everything, "products" keeps the layer's input
            and the results of its matmuls and attention, and "full" keeps only the layer's input.
        placement: The sharding of weights and hidden states during the computation on a mesh; see
            `sharding.fsdp_placement`.

    Returns:
        (hidden [*lead, embed] in `dtype`, state after the last layer).
    """
    config = model.config
    turn = rotation(positions.array, frequencies(config))
    hidden = placement.hidden(model.embedding.take("vocab", tokens).astype(dtype))

    def layer(
        carry: tuple[NamedArray, Any], weights: LlamaLayers | MergedLayers, index: Int[Array, ""]
    ) -> tuple[NamedArray, Any]:
        hidden, state = carry
        weights = jax.tree.map(placement.weight, weights, is_leaf=lambda leaf: isinstance(leaf, NamedArray))
        attended, state = _attention(config, weights, hidden, turn, index, attend, state, placement)
        hidden = placement.residual(hidden + attended)
        return placement.residual(hidden + _mlp(config, weights, hidden, placement)), state

    indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    if remat != "none":
        # Recomputing elementwise work and attention weights is cheaper than storing them (SmolLM2, 2,048 tokens, fp32,
        # 2 cores: 11 s and 2.0 GB per update when keeping matmul results, vs. 25 s and 5.6 GB when keeping everything).
        policy = jax.checkpoint_policies.save_only_these_names(_MATMUL, ATTENDED) if remat == "products" else None
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    if isinstance(model, UnstackedLlama):
        for index, weights in enumerate(model.layers):
            hidden, state = layer((hidden, state), weights, indices[index])
    else:
        hidden, state = hax.fold(layer, "layers")((hidden, state), model.layers, indices)
    return _normed(config, hidden, placement.weight(model.final_norm)), state


def merged(model: Llama, parts: int) -> MergedLlama:
    """Return the model for programs with few tokens on TPUs; see `merged_layers`.

    XLA's TPU backend would copy a weight with a heads axis out of the stack before each matmul. These copies were 35 of
    the 150 us that it estimated per layer, for 64 sequences of an 8B model on 4 v5p chips.
    """
    layers = merged_layers(model.layers, parts)
    return MergedLlama(model.embedding, layers, model.final_norm, model.head, model.config)


def merged_layers(layers: LlamaLayers, parts: int) -> MergedLayers:
    """Return the layers for programs with few tokens, whose heads are sharded into `parts` equal parts over devices.

    Within each part, one matmul computes queries, keys and values. No weight has a separate heads axis.
    """
    num_layers, embed = layers.attn_norm.axes
    by_part = [
        weight.array.reshape(num_layers.size, parts, -1, embed.size) for weight in (layers.wq, layers.wk, layers.wv)
    ]
    wqkv = jnp.concatenate(by_part, axis=2)
    wo = layers.wo.array.reshape(num_layers.size, embed.size, -1)
    return MergedLayers(
        attn_norm=layers.attn_norm,
        wqkv=NamedArray(wqkv, (num_layers, Axis("parts", parts), Axis("rows", wqkv.shape[2]), embed)),
        wo=NamedArray(wo, (num_layers, embed, Axis("heads", wo.shape[2]))),
        mlp_norm=layers.mlp_norm,
        w_gate=layers.w_gate,
        w_up=layers.w_up,
        w_down=layers.w_down,
    )


def unstacked(layers: AnyLayers) -> tuple[AnyLayers, ...]:
    """Return separate arrays for each layer's parameters, for a `transform` that is unrolled over layers.

    XLA's CPU backend copies each layer's slice out of a stack before the matmul, and first converts a bfloat16 stack to
    float32 (SmolLM2, 128 rows, 2 cores with AVX512_BF16: 188 ms per pass in bfloat16, 48 ms unstacked; in fp32 87 and
    79 ms). Its GPU backend copies too.
    """
    num_layers = layers.attn_norm.resolve_axis("layers").size

    def layer(index: int) -> AnyLayers:
        return jax.tree.map(
            lambda leaf: leaf["layers", index], layers, is_leaf=lambda leaf: isinstance(leaf, NamedArray)
        )

    return tuple(map(layer, range(num_layers)))


def unembedding(model: AnyLlama) -> NamedArray:
    """Return the matrix [vocab, embed] that maps hidden states to logits, tied or not."""
    return model.embedding if model.head is None else model.head


def logits(model: AnyLlama, hidden: NamedArray) -> NamedArray:
    """Return fp32 logits [*lead, vocab] of hidden states [*lead, embed].

    The matmul runs in hidden's dtype with fp32 accumulation.
    """
    matrix = unembedding(model)
    out = matmul(hidden.array, matrix.array.astype(hidden.dtype), hidden.ndim - 1, 1)
    return NamedArray(out, (*hidden.axes[:-1], matrix.axes[0]))


def frequencies(config: LlamaConfig) -> Float[np.ndarray, " half_head"]:
    """Return the rotary frequencies of a model, in radians per position, fp32."""
    plain = rope_frequencies(config.head_dim, config.rope_theta)
    if config.rope_scaling is None:
        return plain
    return llama3_scaled_frequencies(
        plain,
        factor=config.rope_scaling.factor,
        low_freq_factor=config.rope_scaling.low_freq_factor,
        high_freq_factor=config.rope_scaling.high_freq_factor,
        original_max_seq_len=config.rope_scaling.original_max_seq_len,
    )


def _axes(config: LlamaConfig) -> dict[str, tuple[Axis, ...]]:
    """Return the axes of every parameter, by field name."""
    layers, embed, mlp = (
        Axis("layers", config.num_layers),
        Axis("embed", config.hidden_size),
        Axis("mlp", config.intermediate_size),
    )
    vocab, head_size = Axis("vocab", config.vocab_size), Axis("head_size", config.head_dim)
    heads, kv_heads = Axis("heads", config.num_heads), Axis("kv_heads", config.num_kv_heads)
    return {
        "embedding": (vocab, embed),
        "head": (vocab, embed),
        "final_norm": (embed,),
        "attn_norm": (layers, embed),
        "wq": (layers, heads, head_size, embed),
        "wk": (layers, kv_heads, head_size, embed),
        "wv": (layers, kv_heads, head_size, embed),
        "wo": (layers, embed, heads, head_size),
        "mlp_norm": (layers, embed),
        "w_gate": (layers, mlp, embed),
        "w_up": (layers, mlp, embed),
        "w_down": (layers, embed, mlp),
    }


def _attention(
    config: LlamaConfig,
    weights: LlamaLayers | MergedLayers,
    hidden: NamedArray,
    turn: Rotation,
    index: Int[Array, ""],
    attend: Attend,
    state: Any,
    placement: Placement,
) -> tuple[NamedArray, Any]:
    normed = _normed(config, hidden, weights.attn_norm)
    lead, head_size = normed.axes[:-1], Axis("head_size", config.head_dim)
    counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    if isinstance(weights, MergedLayers):
        together = _project(placement, normed, weights.wqkv, "embed").array
        rows = [count * config.head_dim // together.shape[-2] for count in counts]
        projected = jnp.split(together, [rows[0], rows[0] + rows[1]], axis=-1)
    else:
        projected = [
            _project(placement, normed, weight, "embed").array for weight in (weights.wq, weights.wk, weights.wv)
        ]
    sizes = tuple(axis.size for axis in lead)
    q, k, v = (x.reshape(*sizes, count, head_size.size) for x, count in zip(projected, counts, strict=True))
    turned = apply_rope_by_matmul if placement.keeps_heads else apply_rope
    out, state = attend(index, turned(q, turn), turned(k, turn), v, state)
    out = NamedArray(out, (*lead, Axis("heads", config.num_heads), head_size))
    return _project(placement, out, weights.wo, "heads", "head_size"), state


def _mlp(
    config: LlamaConfig, weights: LlamaLayers | MergedLayers, hidden: NamedArray, placement: Placement
) -> NamedArray:
    normed = _normed(config, hidden, weights.mlp_norm)
    gate = _project(placement, normed, weights.w_gate, "embed")
    up = _project(placement, normed, weights.w_up, "embed")
    return _project(placement, hax.nn.silu(gate) * up, weights.w_down, "mlp")


def _project(placement: Placement, x: NamedArray, weight: NamedArray, *contracted: str) -> NamedArray:
    """Contract the named axes, which are last in x and in weight. The result has x's other axes, then weight's.

    A merged weight has only the axis "heads", which stands for both "heads" and "head_size" (see `merged`).

    Unless `placement.keeps_heads`, the operands are reshaped to matrices: XLA's CPU backend copies a [heads, head_size,
    embed] weight transposed before each matmul. `haliax.dot` is not used because it
    calls a JAX function that JAX 0.12 no longer has.
    """
    lead, out = (tuple(axis for axis in array.axes if axis.name not in contracted) for array in (x, weight))
    transposed = placement.gradient(out, tuple(axis for axis in weight.axes if axis.name in contracted))
    if placement.keeps_heads:
        projected = linear(x.array, weight.array, transposed, len(contracted))
    else:
        matrix = weight.array.reshape(math.prod(axis.size for axis in out), -1)
        rows = x.array.reshape(*(axis.size for axis in lead), matrix.shape[1])
        projected = linear(rows, matrix, transposed)
    axes = lead + out
    return NamedArray(checkpoint_name(projected, _MATMUL).reshape(tuple(axis.size for axis in axes)), axes)


def _normed(config: LlamaConfig, hidden: NamedArray, scale: NamedArray) -> NamedArray:
    return NamedArray(rms_norm(hidden.array, scale.array, config.rms_norm_eps), hidden.axes)
