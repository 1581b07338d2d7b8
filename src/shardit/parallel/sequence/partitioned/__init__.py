"""Blocks that every rank runs on all tokens: their operations are partitioned over the ranks."""
