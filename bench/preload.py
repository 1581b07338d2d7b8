"""What the fork server imports once, so that ranks start in milliseconds. Not part of the start-up measurement."""

import diffusers
import greenlet
import torch
import torch.distributed
import transformers

torch.set_num_threads(1)
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
diffusers.WanPipeline  # noqa: B018  (loads the lazy module)
__all__ = ["diffusers", "greenlet", "torch", "transformers"]
