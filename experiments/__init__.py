"""Experiments, one DAG per file, and code that only they use: builders of DAGs and their settings files."""
