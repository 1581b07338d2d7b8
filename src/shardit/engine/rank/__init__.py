"""The process of a rank, and the fork server."""
