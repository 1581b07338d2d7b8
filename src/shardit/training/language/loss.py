"""The causal loss: the mean over the label tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardit.training.language.batches import IGNORED


def causal_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the cross entropy of each label given the tokens before it, summed, over their number.

    There is no attention mask: padding is on the right, so no token that is learnt sees it.
    """
    device = next(one.device for one in model.parameters() if not one.is_meta)
    ids, labels = batch["ids"].to(device), batch["labels"].to(device)[:, 1:]
    forward: Any = model
    logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
    total = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / torch.count_nonzero(labels != IGNORED)
