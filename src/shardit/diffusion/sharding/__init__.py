"""A pipeline becomes a parallel one, in place."""
