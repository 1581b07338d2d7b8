"""Tensor parallelism: linears cut over ranks."""
