"""Modules in place: finding blocks, patching, noticing changes."""
