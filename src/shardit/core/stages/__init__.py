"""Calls of a transformer over pipeline stages, guidance ranks and in flight."""
