"""Comparison of sliced units with whole ones."""
