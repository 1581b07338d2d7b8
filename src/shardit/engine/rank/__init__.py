"""The process of a rank, and the one that forks it."""
