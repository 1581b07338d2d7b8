"""Tiny checkpoints as data: the parts of each pipeline."""
