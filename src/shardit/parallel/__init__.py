"""Parallelism inside a block: what is cut other than the list of blocks."""
