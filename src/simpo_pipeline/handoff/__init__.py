"""Conversion of trainer parameters to inference weights, on device."""
