"""Runs a request: its copy of the pipeline, its attention processors, its progress, and its truncated prompts."""
