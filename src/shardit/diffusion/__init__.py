"""Diffusers pipelines."""
