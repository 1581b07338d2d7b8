"""Shards of tokens."""
