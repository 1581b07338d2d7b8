"""Loading of causal language models, from a name to the weights of a rank."""
