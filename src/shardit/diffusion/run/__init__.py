"""A request while it runs: its copy of the pipeline, the processors it sets, its steps, prompts that were cut."""
