"""Entry points of a server."""
