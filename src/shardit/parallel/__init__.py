"""Axes of parallelism besides pipeline stages: what is cut inside a block, and what the ranks then tell each other."""
