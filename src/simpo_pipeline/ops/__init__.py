"""Pure array functions: attention, rotary embedding, norm, log-probabilities."""
