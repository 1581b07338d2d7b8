"""Sequence parallelism by a declared plan."""
