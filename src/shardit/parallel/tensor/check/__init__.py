"""Sliced units compared with whole ones."""
