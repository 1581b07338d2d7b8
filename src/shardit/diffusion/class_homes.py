"""Where in diffusers the classes of components live."""

CUT_PACKAGES = ("diffusers.models.transformers", "diffusers.models.unets")
"""Where the classes live that denoise, and so are cut; everything else of a pipeline runs once or twice a request."""
