"""Loading of pipelines: options, schedulers, packages, configurations of known models."""
