"""Destinations of metrics other than the step outputs."""
