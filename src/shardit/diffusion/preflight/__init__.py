"""Mistakes found before torch is imported."""
