"""Step functions that the executor runs: one function and its config per file."""
