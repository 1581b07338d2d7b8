"""From pixels to normalised latents, as the pipelines do it in reverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardit.errors import UnsupportedError
from shardit.training.diffusion.families.table import TrainingFamily


def _scaled(config: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images: a shift and a factor, after mean and deviation by channel if the configuration has those."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        mean, deviation = _by_channel(mean, latents), _by_channel(deviation, latents)
        return (latents - mean) * config.scaling_factor / deviation
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _standardised(config: Any, latents: torch.Tensor) -> torch.Tensor:
    """Videos: mean and deviation by channel."""
    return (latents - _by_channel(config.latents_mean, latents)) / _by_channel(config.latents_std, latents)


def _by_channel(values: Any, latents: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, *([1] * (latents.dim() - 2)))


NORMALISED: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "AutoencoderKL": _scaled,
    "AutoencoderKLWan": _standardised,
    "AutoencoderKLQwenImage": _standardised,
}
"""Normalisation of latents, by class of VAE."""


def check_vae(vae: Any) -> None:
    """Raise UnsupportedError for a class without an entry."""
    if type(vae).__name__ not in NORMALISED:
        raise UnsupportedError(f"{type(vae).__name__} cannot be trained with; these VAEs can: {', '.join(NORMALISED)}")


@torch.no_grad()
def encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return the normalised latents of one image or clip of (C, [F,] H, W) in [-1, 1].

    They are the mode of the posterior, not a draw of it: the same in each epoch, and as pipelines encode images that
    they are given.
    """
    first = next(vae.parameters())
    given = pixels[None].to(first.device, first.dtype)
    if type(vae).__name__ != "AutoencoderKL" and given.dim() == 4:
        given = given.unsqueeze(2)
    made = vae.encode(given).latent_dist.mode()
    return NORMALISED[type(vae).__name__](vae.config, made)[0].float().cpu()


@torch.no_grad()
def condition_of(family: TrainingFamily, pipe: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what the model is given of the first frame, as the pipeline makes it; empty if it is given none."""
    if not family.first_frame:
        return {}
    frames, height, width = pixels.shape[1:]
    latents = torch.zeros(1)  # in place of the noise, which the pipeline would draw
    device = next(pipe.vae.parameters()).device
    made = pipe.prepare_latents(
        pixels[None, :, 0].to(device), 1, pipe.vae.config.z_dim, height, width, frames, torch.float32, device, None,
        latents,
    )  # fmt: skip
    named = zip(("latents", "free"), made[1:], strict=False)
    return {name: tensor[0].float().cpu() for name, tensor in named}
