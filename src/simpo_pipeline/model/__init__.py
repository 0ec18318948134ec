"""The Llama family: config, transformer, shardings, weights."""
