"""Ranks of a server: on this machine, by Ray, by torchrun."""
