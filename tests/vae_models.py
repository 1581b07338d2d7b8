"""Small VAEs of many diffusers classes with random weights, and inputs that fall into several tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

KL = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
TILE = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
STRIDE = {"tile_sample_stride_height": 24, "tile_sample_stride_width": 24}


@dataclass(frozen=True)
class Entry:
    """A VAE class: its config, arguments of `enable_tiling`, shapes of what is decoded and encoded, more arguments."""

    cls: str
    config: dict[str, Any] = field(hash=False)
    latent: tuple[int, ...]
    sample: tuple[int, ...] | None
    tiling: dict[str, Any] = field(default_factory=lambda: {**TILE, **STRIDE}, hash=False)
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)
    decode: dict[str, Any] = field(default_factory=dict, hash=False)

    def build(self) -> Any:
        """The VAE, with the same weights every time."""
        import diffusers

        torch.manual_seed(0)
        vae = getattr(diffusers, self.cls)(**self.config).eval()
        with torch.no_grad():
            for p in vae.parameters():  # some start at zero
                p.copy_(torch.randn(p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
        return vae

    def calls(self, vae: Any) -> dict[str, Callable[[], torch.Tensor]]:
        """The methods that there is an input for, to be called."""
        more = {"decode": self.decode, "encode": {}}

        def call(name: str, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tensor_of(getattr(vae, name)(x, **more[name]))

        return {name: functools.partial(call, name, x) for name, x in inputs(self).items()}

    def switch_on(self, vae: Any) -> None:
        """Tiles small enough for several of them."""
        vae.enable_tiling(**self.tiling)
        for name, value in self.attributes.items():
            setattr(vae, name, value)


WAN = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1}
WAN |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}

ENTRIES = {
    "wan2.1": Entry("AutoencoderKLWan", WAN, (1, 4, 3, 8, 10), (1, 3, 9, 64, 80)),
    "wan2.2": Entry(
        "AutoencoderKLWan",
        {
            **WAN,
            "decoder_base_dim": 4,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
        (1, 4, 2, 4, 5),
        (1, 3, 5, 64, 80),
    ),
    "qwen": Entry(
        "AutoencoderKLQwenImage",
        {**WAN, "temperal_downsample": [False, True, True]},
        (1, 4, 1, 8, 10),
        (1, 3, 1, 64, 80),
    ),
    "kl": Entry("AutoencoderKL", KL, (1, 4, 20, 14), (1, 3, 80, 56), {}),
    "kl without quant": Entry(
        "AutoencoderKL",
        {**KL, "use_quant_conv": False, "use_post_quant_conv": False},
        (2, 4, 20, 14),
        (2, 3, 80, 56),
        {},
    ),
    "flux2": Entry("AutoencoderKLFlux2", {**KL, "patch_size": [2, 2]}, (1, 4, 20, 14), (1, 3, 80, 56), {}),
}


def tensor_of(result: Any) -> torch.Tensor:
    """The tensor in what decode or encode returns."""
    for name in ("sample", "latent"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result.latent_dist.parameters


def inputs(entry: Entry) -> dict[str, torch.Tensor]:
    """What each method is given."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"decode": entry.latent, "encode": entry.sample}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if shape}


def outputs(entry: Entry, vae: nn.Module) -> dict[str, torch.Tensor]:
    """What each method returns."""
    return {name: call() for name, call in entry.calls(vae).items()}
