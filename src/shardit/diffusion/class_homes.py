"""Modules that define the classes of a pipeline's components."""

MODELS = "diffusers.models."
"""All models of diffusers, with what they are made of, such as attention processors."""

CUT_PACKAGES = ("diffusers.models.transformers", "diffusers.models.unets")
"""Models that denoise, and so are cut; everything else of a pipeline runs once or twice a request."""

VAE_PACKAGE = "diffusers.models.autoencoders"
"""VAEs."""

ENCODERS = "transformers."
"""Text and image encoders."""
