"""Requests: prompts and parameters become calls of a pipeline."""
