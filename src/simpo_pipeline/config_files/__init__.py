"""Strict decoding of settings from YAML text and the command line."""
