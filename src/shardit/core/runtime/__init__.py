"""What calls in flight share on one rank: coroutines, pending tensors, the order of steps, requests."""
