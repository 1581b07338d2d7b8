"""The autoencoder of tiny/shapes: `AutoencoderKLWan`, trained on drawn clips."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from model import FRAMES, SIZE, built, pixels
from torch import Tensor

from shardit.training.data import shapes

_WIDE = 16
"""Latent channels at first."""

_CLIPS = 200
"""Clips whose latents have their mean and deviation measured."""

Phases = tuple[tuple[float, int, int, int], ...]
"""Until this share of the steps: clips in a batch, their frames, and the side of the crop. Small crops around the
edges of shapes have more to teach for each pixel."""

FIRST: Phases = ((0.5, 24, 5, 16), (0.8, 6, 9, 32), (1.0, 2, FRAMES, SIZE))
AFTERWARDS: Phases = ((0.4, 24, 5, 16), (0.75, 6, 9, 32), (1.0, 2, FRAMES, SIZE))


def trained(steps: int, more: int, report: Callable[[int, float], None]) -> Any:
    """Return an autoencoder with the latent channels of the recipe. report: called with step and mean absolute error,
    of values in [-1, 1].

    With so few channels it learns badly. It gets many, which turn out to vary along three directions only (about the
    colour of a cell), and loses the others after `steps`; `more` steps sharpen it. The video model learns several times
    faster with these latents, as it need not learn which of many channels go together.
    """
    wide = built("vae", z_dim=_WIDE, latents_mean=[0.0] * _WIDE, latents_std=[1.0] * _WIDE)
    train(wide, steps, report, FIRST, rate=2e-3)
    narrow = built("vae")
    reduce(wide, narrow)
    train(narrow, more, report, AFTERWARDS, rate=8e-4)
    return narrow


def train(
    model: Any, steps: int, report: Callable[[int, float], None], phases: Phases, rate: float, seed: int = 0
) -> None:
    """Train an autoencoder; its latents have mean 0 and deviation 1 afterwards."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    with torch.no_grad():  # a posterior that starts wide hides what the encoder learns
        model.quant_conv.bias[model.config.z_dim :] -= 5
    decoded: list[Tensor] = []
    # `decode` clamps, and what is clamped has no gradient.
    hook = model.decoder.register_forward_hook(lambda *call: decoded.append(call[-1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0)
    for step in range(steps):
        share = step / steps
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * share))
        _, count, frames, side = next(phase for phase in phases if share < phase[0])
        clips = torch.stack([_crop(draw, frames, side) for _ in range(count)])
        posterior = model.encode(clips).latent_dist
        decoded.clear()
        model.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean))
        error = torch.cat(decoded, 2) - clips
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        (error.abs().mean() + error.square().mean() + 1e-4 * divergence).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, float(error.detach().abs().mean()))
    hook.remove()
    normalize(model)


@torch.no_grad()
def reduce(wide: Any, narrow: Any) -> None:
    """Give the weights of an autoencoder to one with fewer channels: the principal components of its latents."""
    clips = [pixels(shapes.drawing(number, seed=2)) for number in range(min(64, _CLIPS))]
    latents = torch.cat([wide.encode(clip[None]).latent_dist.mean for clip in clips])
    cells = latents.transpose(0, 1).flatten(1).T
    mean, channels = cells.mean(0), narrow.config.z_dim
    basis = torch.linalg.svd(cells - mean, full_matrices=False).Vh[:channels].T
    deviation = ((cells - mean) @ basis).std(0)
    old, new = wide.state_dict(), narrow.state_dict()
    new |= {name: old[name] for name in new if old[name].shape == new[name].shape}
    # Means: the projection follows `quant_conv`, and both go into the convolution in front of it.
    into = (basis / deviation).T
    quant, bias = old["quant_conv.weight"][:_WIDE, :, 0, 0, 0], old["quant_conv.bias"][:_WIDE]
    # The deviations are small constants at first; `train` makes those of a model smaller before it begins.
    weight = new["encoder.conv_out.weight"].zero_()
    weight[:channels] = torch.einsum("ka,ab,b...->k...", into, quant, old["encoder.conv_out.weight"])
    new["encoder.conv_out.bias"].fill_(-5)[:channels] = into @ (quant @ old["encoder.conv_out.bias"] + bias - mean)
    # The decoder: `post_quant_conv` follows the way back, and both go into the convolution after it.
    post = old["post_quant_conv.weight"][:, :, 0, 0, 0]
    first = old["decoder.conv_in.weight"]
    new["decoder.conv_in.weight"] = torch.einsum("oa...,ak->ok...", first, post @ (basis * deviation))
    constant = post @ mean + old["post_quant_conv.bias"]
    new["decoder.conv_in.bias"] = old["decoder.conv_in.bias"] + torch.einsum("oa...,a->o", first, constant)
    for name in ("quant_conv", "post_quant_conv"):
        count = len(new[f"{name}.bias"].zero_())
        new[f"{name}.weight"] = torch.eye(count)[:, :, None, None, None]
    narrow.load_state_dict(new)


@torch.no_grad()
def normalize(model: Any) -> None:
    """Put the mean and the deviation of latents into the convolutions around them, so that the configuration needs
    none."""
    clips = [pixels(shapes.drawing(number, seed=2)) for number in range(_CLIPS)]
    latents = torch.cat([model.encode(clip[None]).latent_dist.mean for clip in clips])
    mean, deviation = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    into, out, channels = model.quant_conv, model.post_quant_conv, model.config.z_dim
    into.weight[:channels] /= deviation.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()
    out.bias += out.weight[:, :, 0, 0, 0] @ mean
    out.weight *= deviation.view(1, -1, 1, 1, 1)


def _crop(draw: random.Random, frames: int, side: int) -> Tensor:
    """Return a part of a random clip around the path of its shape."""
    drawing = shapes.drawing(draw.randrange(10**9), seed=3, kind="diagonal")
    first, clip = draw.randrange(FRAMES - frames + 1), pixels(drawing)
    left, top = (_corner(draw, centre, side) for centre in drawing.centre)
    return clip[:, first : first + frames, top : top + side, left : left + side]


def _corner(draw: random.Random, centre: float, side: int) -> int:
    around = int(centre * SIZE) - side // 2 + draw.randint(-side // 2 - 4, side // 2 + 4)
    return max(0, min(SIZE - side, around))
