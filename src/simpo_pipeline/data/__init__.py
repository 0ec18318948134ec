"""Preference records to tokenised pairs to batches."""
