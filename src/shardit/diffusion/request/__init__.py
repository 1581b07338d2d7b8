"""Requests: turns prompts and parameters into calls of a pipeline."""
