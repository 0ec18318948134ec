"""Strict JAX for every test: no silent dtype promotion, no silent broadcasting across ranks, CPU only."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
