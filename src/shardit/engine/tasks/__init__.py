"""Kinds of models that ranks run: each is checked, loaded over the ranks, called for a request, and has its results."""
