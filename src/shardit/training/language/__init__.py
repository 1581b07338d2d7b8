"""The recipe of causal language models: rows of texts and conversations, their labels, adapters, samples and files."""
