"""Processes of the engine: start, channel, messages, failures."""
