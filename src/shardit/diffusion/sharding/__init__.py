"""Sharding of a pipeline in place."""
