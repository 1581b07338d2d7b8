"""What the fork server imports once, so that a rank starts in milliseconds."""

import diffusers
import greenlet
import torch
import transformers

torch.set_num_threads(1)
for _name in (
    "WanPipeline",
    "WanImageToVideoPipeline",
    "QwenImagePipeline",
    "QwenImageEditPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "ZImagePipeline",
    "LongCatImagePipeline",
    "LongCatImageEditPipeline",
    "OvisImagePipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
):
    getattr(diffusers, _name)
__all__ = ["diffusers", "greenlet", "torch", "transformers"]
