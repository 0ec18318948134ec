"""Interleave SimPO preference training and large-scale generation in one JAX job, without a checkpoint in between.

`from simpo_pipeline import LLM, SamplingParams` is all that plain generation needs. jax is imported with `LLM` only, so
that plans can be made without it.
"""

from typing import TYPE_CHECKING, Any

from simpo_pipeline.inference.config import SamplingParams

if TYPE_CHECKING:
    from simpo_pipeline.inference.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from simpo_pipeline.inference.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
