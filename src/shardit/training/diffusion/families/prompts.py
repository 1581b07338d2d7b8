"""Embeddings of prompts: made by the pipeline's own `encode_prompt`, one prompt at a time, and joined to batches."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from shardit.training.diffusion.families.table import TrainingFamily, call_default


def longest_prompt(pipe: Any, own: dict[str, Any], limit: int) -> int | None:
    """Return the number of tokens that prompts get: as in a call of the pipeline, at most the `limit`; None if the
    pipeline takes no such number. own: what the model is called with by default."""
    usual = own.get("max_sequence_length", call_default(type(pipe), "max_sequence_length"))
    return None if usual is None else min(int(usual), limit)


@torch.no_grad()
def embedded(family: TrainingFamily, pipe: Any, caption: str, longest: int | None) -> dict[str, torch.Tensor]:
    """Return the tensors of one prompt by name, without a batch dimension."""
    named = _embedded(family, pipe, [caption], longest, pipe._execution_device)
    return {name: tensor[0].contiguous().cpu() for name, tensor in named.items()}


def embedded_with_gradients(
    family: TrainingFamily, pipe: Any, captions: Sequence[str], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return the tensors of prompts by name, as a batch, for text encoders that are trained."""
    return _embedded(family, pipe, list(captions), None, device)


def _embedded(
    family: TrainingFamily, pipe: Any, captions: list[str], longest: int | None, device: torch.device
) -> dict[str, Any]:
    """Call the pipeline's `encode_prompt`. SDXL may want zeros for an empty prompt, which that does only for negative
    ones."""
    takes = inspect.signature(pipe.encode_prompt).parameters
    given: dict[str, Any] = {
        "prompt": captions,
        "prompt_2": None,
        "prompt_3": None,
        "device": device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        **({} if longest is None else {"max_sequence_length": longest}),
    }
    made = pipe.encode_prompt(**{name: value for name, value in given.items() if name in takes})
    named = {name: one for name, one in zip(family.returns, made, strict=True) if name and one is not None}
    if "" in captions and pipe.config.get("force_zeros_for_empty_prompt"):
        kept = torch.tensor([bool(caption) for caption in captions], device=device)
        named = {name: one * kept.view(-1, *([1] * (one.dim() - 1))).to(one.dtype) for name, one in named.items()}
    return named


def joined(family: TrainingFamily, prompts: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the tensors of several prompts as a batch."""
    if family.listed:
        return {name: [one[name] for one in prompts] for name in prompts[0]}
    if not family.padded:
        return {name: torch.stack([one[name] for one in prompts]) for name in prompts[0]}
    lengths = [len(one["embeds"]) for one in prompts]
    longest = max(lengths)
    embeds = torch.stack([pad(one["embeds"], (0, 0, 0, longest - len(one["embeds"]))) for one in prompts])
    if min(lengths) == longest:
        return {"embeds": embeds}
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return {"embeds": embeds, "mask": mask.long()}
