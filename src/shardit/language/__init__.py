"""Support for causal language models of transformers."""
