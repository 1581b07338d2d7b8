"""Which rank holds what: blocks, encoders, VAEs, slices."""
