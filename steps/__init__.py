"""Step functions: what the executor runs, one function and its config a file."""
