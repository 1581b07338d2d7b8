"""From the name of a causal language model to its weights on a rank."""
