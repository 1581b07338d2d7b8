"""Placement of blocks, encoders, VAEs and slices on ranks."""
