"""Grammars of texts: which tokens may come next, by llguidance."""
