"""The survey of pipelines: every pipeline class of diffusers that can be built tiny, whole calls against plain."""
