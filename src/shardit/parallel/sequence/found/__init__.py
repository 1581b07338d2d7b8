"""Sequence parallelism found by trial, block call by block call."""
