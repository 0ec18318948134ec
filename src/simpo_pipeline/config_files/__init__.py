"""Strict settings from YAML text and the command line."""
