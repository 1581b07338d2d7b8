"""Optimizer steps of a run: its micro-batches, rates, optimizers and averages, and looks at what has been trained."""
