"""Continuous batching: sequences join and leave the batches of a language model between its steps."""
