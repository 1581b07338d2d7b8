"""Weights that the configuration ties and the files do not: transformers then keeps both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardit.core.modules.patching import set_tensor
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.weights import tied_names

CHUNK = 1 << 24
"""Bytes that are compared at once."""


def untie(module: Any, checkpoint: Checkpoint) -> None:
    """Give a model on meta separate parameters for tied names under which the files have different tensors, in place.

    Reads the tensors of these names if the files have several of them, which is rare.
    """
    for names in tied_names(module):
        stored = [name for name in names if name in checkpoint.files]
        others = [name for name in stored[1:] if not _same_bytes(checkpoint, stored[0], name)]
        for name in others:
            tied = module.get_parameter(name)
            set_tensor(module, name, nn.Parameter(torch.empty_like(tied), tied.requires_grad))
        if others:
            module.config.get_text_config(decoder=True).tie_word_embeddings = False
            module.config.tie_word_embeddings = False


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    checkpoint.ensure({checkpoint.files[one], checkpoint.files[other]})
    first, second = checkpoint.entry(one), checkpoint.entry(other)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with (
        open(checkpoint.folder / checkpoint.files[one], "rb") as left,
        open(checkpoint.folder / checkpoint.files[other], "rb") as right,
    ):
        left.seek(first.start)
        right.seek(second.start)
        counts = (min(CHUNK, first.nbytes - done) for done in range(0, first.nbytes, CHUNK))
        return all(left.read(count) == right.read(count) for count in counts)
