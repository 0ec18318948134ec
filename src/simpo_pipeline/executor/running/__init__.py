"""Carry out a plan: attempts, live values, commits."""
