"""Blocks that every rank runs on all tokens, since these cannot be split: their operations are partitioned over the
ranks."""
