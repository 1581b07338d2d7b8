"""Prompts of a user become rows and groups; tokens become texts."""
