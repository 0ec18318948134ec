"""Paths and files, local or remote."""
