"""Sequence parallelism of a transformer."""
