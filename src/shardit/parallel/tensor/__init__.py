"""Tensor parallelism: linears over ranks."""
