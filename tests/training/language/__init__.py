"""Tests of the recipe of causal language models."""
