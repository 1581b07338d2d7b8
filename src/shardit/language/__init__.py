"""Everything that knows causal language models of transformers."""
