"""The recipe of diffusers pipelines: caches, timesteps, objectives, adapters, samples and files."""
