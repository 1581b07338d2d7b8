"""`shardit train`: the command, the ranks that it starts, and the loop of optimizer steps."""
