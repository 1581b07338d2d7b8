"""Attention over sharded tokens: Ulysses, Ring."""
