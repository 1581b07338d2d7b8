"""Decoders over stages: every rank runs the same code, each block runs on its owner, and data moves when it is used."""
