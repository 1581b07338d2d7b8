"""Axes of parallelism inside a block: sharded attention, linears and VAE tiles, and their communication."""
