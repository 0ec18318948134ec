"""Preflight: memory and time that a job's programs need on a topology, found by compiling them without its devices."""
