"""Requests for texts: their fields, their tokens, and their answers in OpenAI's format."""
