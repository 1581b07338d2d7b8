"""Gradients of the parameters of a stage: which there are, when they are computed, how ranks sum them."""
