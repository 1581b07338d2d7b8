"""Model calls of the pipelines of each family: arguments, packing, position ids, sign of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GUIDANCE = 1.0
"""The guidance that distilled models are trained with: a plain prediction, without more of the prompt."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model call; batched, on its device, in its type.

    noised: latents as the VAE makes them. times: timesteps, float32. text: tensors of the prompts by name; a list has
    one for each sample. condition: what the VAE made of the first frame, if the family has one. pipeline: the class,
    for its helper methods. settings: configuration of the pipeline.
    """

    noised: torch.Tensor
    times: torch.Tensor
    text: dict[str, Any]
    condition: dict[str, torch.Tensor]
    pipeline: Any
    settings: dict[str, Any]


Predict = Callable[[Any, Inputs], torch.Tensor]
"""Calls a model; returns its prediction in the layout of the latents."""


def wan(model: Any, x: Inputs) -> torch.Tensor:
    """Wan, text to video."""
    times = _by_token(model, torch.ones_like(x.noised[:1, :1]), x.times) if x.settings["expand_timesteps"] else x.times
    return _wan(model, x, x.noised, times)


def wan_image(model: Any, x: Inputs) -> torch.Tensor:
    """Wan, image to video: the first frame is given, as channels or in place of the first latent frame."""
    if not x.settings["expand_timesteps"]:
        return _wan(model, x, torch.cat([x.noised, x.condition["latents"]], dim=1), x.times)
    free = x.condition["free"]
    given = (1 - free) * x.condition["latents"] + free * x.noised
    return _wan(model, x, given, _by_token(model, free[:1], x.times))


def _wan(model: Any, x: Inputs, given: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    return model(hidden_states=given, timestep=times, encoder_hidden_states=x.text["embeds"], return_dict=False)[0]


def _by_token(model: Any, free: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return the timestep of each token: that of the sample, 0 for what is given."""
    _, rows, columns = model.config.patch_size
    return free[0, 0, :, ::rows, ::columns].flatten().float()[None] * times[:, None]


def flux(model: Any, x: Inputs) -> torch.Tensor:
    """Flux: packed latents with position ids."""
    batch, channels, height, width = x.noised.shape
    packed = x.pipeline._pack_latents(x.noised, batch, channels, height, width)
    ids = x.pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, packed.device, packed.dtype)
    made = model(
        hidden_states=packed,
        timestep=x.times / 1000,
        guidance=_guidance(model, x),
        pooled_projections=x.text["pooled"],
        encoder_hidden_states=x.text["embeds"],
        txt_ids=torch.zeros(x.text["embeds"].shape[1], 3, device=packed.device, dtype=packed.dtype),
        img_ids=ids,
        return_dict=False,
    )[0]
    return x.pipeline._unpack_latents(made, height, width, 1)


def qwen(model: Any, x: Inputs) -> torch.Tensor:
    """Qwen-Image: packed latents with shapes, prompts with a mask."""
    batch, channels, _, height, width = x.noised.shape
    packed = x.pipeline._pack_latents(x.noised[:, :, 0], batch, channels, height, width)
    made = model(
        hidden_states=packed,
        timestep=x.times / 1000,
        guidance=_guidance(model, x),
        encoder_hidden_states=x.text["embeds"],
        encoder_hidden_states_mask=x.text.get("mask"),
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return x.pipeline._unpack_latents(made, height, width, 1)


def _guidance(model: Any, x: Inputs) -> torch.Tensor | None:
    if not model.config.guidance_embeds:
        return None
    return torch.full((len(x.noised),), GUIDANCE, device=x.noised.device, dtype=torch.float32)


def sd3(model: Any, x: Inputs) -> torch.Tensor:
    """Stable Diffusion 3."""
    return model(
        hidden_states=x.noised,
        timestep=x.times,
        encoder_hidden_states=x.text["embeds"],
        pooled_projections=x.text["pooled"],
        return_dict=False,
    )[0]


def z_image(model: Any, x: Inputs) -> torch.Tensor:
    """Z-Image: lists of latents and prompts; time runs from noise, and the prediction points from it."""
    images = list(x.noised.unsqueeze(2).unbind(0))
    made = model(images, (1000 - x.times) / 1000, list(x.text["embeds"]), return_dict=False)[0]
    return -torch.stack(list(made)).squeeze(2)


def unet(model: Any, x: Inputs) -> torch.Tensor:
    """Stable Diffusion and SDXL: a UNet, which may take sizes and the pooled prompt."""
    added: dict[str, Any] = {}
    if model.config.addition_embed_type == "text_time":
        scale = x.settings["vae_scale"]
        size = [side * scale for side in x.noised.shape[-2:]]
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=x.noised.dtype, device=x.noised.device)
        added = {"added_cond_kwargs": {"text_embeds": x.text["pooled"], "time_ids": ids.repeat(len(x.noised), 1)}}
    embeds = x.text["embeds"]
    return model(x.noised, x.times.long(), encoder_hidden_states=embeds, return_dict=False, **added)[0]
