"""Cuts a loss function at the block calls of its model, and runs its forward and backward over stages."""
