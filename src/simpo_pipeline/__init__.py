"""Interleave SimPO preference training and large-scale generation in one JAX job, without a checkpoint in between."""
