"""Trials of a sweep that share one copy of the base, one gather and one dequantization (README.md)."""
