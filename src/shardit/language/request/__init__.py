"""Conversion of users' prompts to rows and groups, and of tokens to text."""
