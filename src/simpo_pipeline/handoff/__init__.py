"""Trainer parameters become inference weights, on device."""
