"""The runtime of calls in flight on one rank: coroutines, pending tensors, the order of steps, requests."""
