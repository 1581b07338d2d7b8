"""Checks for mistakes before torch is imported."""
