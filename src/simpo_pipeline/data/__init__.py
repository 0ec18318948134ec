"""Preference records, tokenized pairs and batches."""
