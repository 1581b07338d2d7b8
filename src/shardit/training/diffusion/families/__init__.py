"""Differences among the pipelines that can be trained: prompts, latents and the calls of their models."""
