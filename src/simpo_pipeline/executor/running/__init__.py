"""Execution of a plan: attempts, live values and commits."""
