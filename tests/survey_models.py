"""Tiny random versions of the transformers and UNets of diffusers: class name -> configuration and random inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Draw:
    """Random inputs of one call: seeded, at one of two sizes."""

    def __init__(self, seed: int, big: bool):
        self.generator = torch.Generator().manual_seed(seed)
        self.big = big
        self.side = 6 if big else 4  # of a latent image
        self.text = 7 if big else 5  # tokens
        self.seed = seed

    def n(self, *shape: int) -> torch.Tensor:
        """Normal values."""
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> torch.Tensor:
        """Integers below `high`."""
        return torch.randint(high, shape, generator=self.generator)

    def t(self, *shape: int) -> torch.Tensor:
        """Timesteps from 0 to 1000, one per sample if no shape is given."""
        return torch.rand(shape or (1,), generator=self.generator) * 1000

    def image(self, channels: int, factor: int = 1) -> torch.Tensor:
        """A latent image."""
        return self.n(1, channels, self.side * factor, self.side * factor)

    def video(self, channels: int, frames: int = 2) -> torch.Tensor:
        """A latent video."""
        return self.n(1, channels, frames, self.side, self.side)

    def words(self, width: int) -> torch.Tensor:
        """A text embedding."""
        return self.n(1, self.text, width)

    def tokens(self, width: int) -> torch.Tensor:
        """A packed latent image."""
        return self.n(1, self.side**2, width)

    def mask(self, length: int | None = None, dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """A text mask whose last token is off."""
        mask = torch.ones(1, length or self.text, dtype=dtype)
        mask[:, -1] = 0
        return mask

    def ids(self, axes: int = 3) -> dict[str, torch.Tensor]:
        """Position ids of packed latents and of text."""
        grid = torch.zeros(self.side, self.side, axes)
        grid[..., 1] += torch.arange(self.side)[:, None]
        grid[..., 2] += torch.arange(self.side)[None, :]
        return {"img_ids": grid.reshape(-1, axes), "txt_ids": torch.zeros(self.text, axes)}

    def rope(self, length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A rotary table."""
        angles = torch.arange(length)[:, None] * torch.linspace(1, 0.1, width)[None]
        return angles.cos(), angles.sin()


@dataclass(frozen=True)
class Entry:
    """One class: its name, a tiny configuration and a function that draws the arguments of a call.

    order: `Plan.order`, where there are lists that run in another order than the one they are registered in.
    refused: part of the message of the UnsupportedError with which the class is refused.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    replicate: tuple[str, ...] = ()
    order: tuple[str, ...] | None = None
    refused: str | None = None
    label: str = ""
    returns: tuple[bool, ...] = field(default=(False, True))

    @property
    def id(self) -> str:
        """Name in reports: a class may be there with several configurations."""
        return f"{self.name}{'-' if self.label else ''}{self.label}"

    def build(self) -> nn.Module:
        """The model with seeded weights, none of which are trivially zero."""
        cls = find_class(self.name)
        torch.manual_seed(0)
        model = cls(**self.config).eval()
        return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter seeded random values: matrices that keep the scale, vectors near what they were."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2:
                p.copy_(noise * 0.1 + p.float().clamp(-1, 1).nan_to_num())
            else:
                p.copy_(noise * (0.7 / p[0].numel() ** 0.5))
    return model


def find_class(name: str) -> type:
    """A model class of diffusers, which may not be exported at the top."""
    module, _, cls = name.rpartition(":")
    return getattr(importlib.import_module(module or "diffusers"), cls)


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}  # width 32
_WAN = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 5,
    "rope_max_seq_len": 32,
}
_FLUX = {
    **_HEADS,
    "in_channels": 8,
    "num_layers": 3,
    "num_single_layers": 5,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def _wan(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.video(4), "timestep": d.t(), "encoder_hidden_states": d.words(16)}


def _flux(d: Draw) -> dict[str, Any]:
    return {"hidden_states": d.tokens(8), "encoder_hidden_states": d.words(24), "timestep": d.t() / 1000, **d.ids()}


def _flux_pooled(d: Draw) -> dict[str, Any]:
    return {**_flux(d), "pooled_projections": d.n(1, 24), "guidance": d.t() / 100}


def _sd3(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.image(4),
        "encoder_hidden_states": d.words(24),
        "pooled_projections": d.n(1, 16),
        "timestep": d.t(),
    }


def _z_image(d: Draw) -> dict[str, Any]:
    return {
        "x": [d.n(4, 1, d.side, d.side), d.n(4, 1, d.side, d.side)],
        "t": d.t(2) / 1000,
        "cap_feats": [d.n(d.text, 24), d.n(d.text + 2, 24)],
    }


def _qwen(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.tokens(8),
        "encoder_hidden_states": d.words(24),
        "encoder_hidden_states_mask": None,
        "timestep": d.t() / 1000,
        "img_shapes": [[(1, d.side, d.side)]],
    }


_QWEN = {**_HEADS, "in_channels": 8, "out_channels": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
_SD3 = {
    **_HEADS,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 7,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 12,
}
_Z = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 5,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}

PRODUCTS: list[Entry] = [
    Entry("WanTransformer3DModel", _WAN, _wan),
    Entry(
        "WanTransformer3DModel",
        {**_WAN, "image_dim": 12, "added_kv_proj_dim": 32},
        lambda d: {**_wan(d), "encoder_hidden_states_image": d.n(1, 4, 12)},
        label="image",
    ),
    Entry("QwenImageTransformer2DModel", {**_QWEN, "num_layers": 7}, _qwen),
    Entry(
        "FluxTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": 24, "guidance_embeds": True},
        _flux_pooled,
    ),
    Entry("SD3Transformer2DModel", {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1, 2)}, _sd3),
    Entry("ZImageTransformer2DModel", _Z, _z_image),
    Entry("LongCatImageTransformer2DModel", {**_FLUX, "pooled_projection_dim": 24}, _flux),
    Entry("OvisImageTransformer2DModel", {**_FLUX, "out_channels": 8}, _flux),
]
"""The families that are products of their own, with odd block counts."""


def _ltx(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.n(1, 2 * d.side**2, 4),
        "encoder_hidden_states": d.words(16),
        "timestep": d.t(),
        "encoder_attention_mask": d.mask(),
        "num_frames": 2,
        "height": d.side,
        "width": d.side,
    }


def _hunyuan_video(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4),
        "timestep": d.t(),
        "encoder_hidden_states": d.words(16),
        "encoder_attention_mask": d.mask(),
        "pooled_projections": d.n(1, 8),
        "guidance": d.t(),
    }


_HUNYUAN = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_single_layers": 4,
    "num_refiner_layers": 2,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}


def _text_image(channels: int, width: int, extra: Callable[[Draw], dict[str, Any]] | None = None) -> Any:
    """Inputs (image, text, time) under the usual names, and more."""

    def inputs(d: Draw) -> dict[str, Any]:
        out = {"hidden_states": d.image(channels), "encoder_hidden_states": d.words(width), "timestep": d.t()}
        return {**out, **(extra(d) if extra else {})}

    return inputs


def _text_video(channels: int, width: int, extra: Callable[[Draw], dict[str, Any]] | None = None) -> Any:
    """Inputs (video, text, time) under the usual names, and more."""

    def inputs(d: Draw) -> dict[str, Any]:
        out = {"hidden_states": d.video(channels), "encoder_hidden_states": d.words(width), "timestep": d.t()}
        return {**out, **(extra(d) if extra else {})}

    return inputs


def _frames_first(d: Draw) -> dict[str, Any]:
    """CogVideoX and its like."""
    return {
        "hidden_states": d.n(1, 2, 4, d.side, d.side),
        "encoder_hidden_states": d.n(1, 5, 16),
        "timestep": d.t(),
        "image_rotary_emb": d.rope(2 * (d.side // 2) ** 2, 16),
    }


_COG = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 5,
    "sample_width": 6,
    "sample_height": 6,
    "sample_frames": 5,
    "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True,
}

STRUCTURES: list[Entry] = [
    Entry(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 5,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
        _text_image(4, 16, lambda d: {"timestep": d.t() / 1000, "encoder_attention_mask": d.mask()}),
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "pooled_projection_dim": 8},
        _hunyuan_video,
    ),
    Entry(
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 6,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 5,
            "text_len_t5": 4,
        },
        lambda d: {
            "hidden_states": d.image(4),
            "timestep": d.t(),
            "encoder_hidden_states": d.n(1, 5, 16),
            "text_embedding_mask": d.mask(5, torch.float32),
            "encoder_hidden_states_t5": d.n(1, 4, 16),
            "text_embedding_mask_t5": d.mask(4, torch.float32),
            "image_meta_size": d.t(1, 6),
            "style": d.ints(1, 1),
            "image_rotary_emb": list(d.rope((d.side // 2) ** 2, 16)),
        },
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_single_layers": 4,
            "caption_channels": [12, 16],
            "text_emb_dim": 8,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16),
            "llama_layers": (0, 1, 2, 0, 1, 2, 1),
            "force_inference_output": True,
        },
        lambda d: {
            "hidden_states": d.image(4),
            "timesteps": d.t(),
            "encoder_hidden_states_t5": d.words(12),
            "encoder_hidden_states_llama3": d.n(3, 1, d.text, 16),
            "pooled_embeds": d.n(1, 8),
        },
    ),
    Entry(
        "WanVACETransformer3DModel",
        {**_WAN, "num_layers": 6, "vace_layers": [0, 2, 4], "vace_in_channels": 6},
        lambda d: {**_wan(d), "control_hidden_states": d.video(6), "control_hidden_states_scale": torch.ones(3) * 0.7},
    ),
    Entry(
        "WanVACETransformer3DModel",
        {**_WAN, "num_layers": 6, "vace_layers": [0, 2, 4], "vace_in_channels": 6},
        lambda d: {**_wan(d), "control_hidden_states": d.video(6), "control_hidden_states_scale": torch.ones(3) * 0.7},
        order=("vace_blocks", "blocks"),
        label="order",
    ),
    Entry(
        "LatteTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 16,
            "video_length": 2,
        },
        _text_video(4, 16),
    ),
    Entry(
        "UVit2DModel",
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 16,
            "vocab_size": 32,
            "codebook_size": 24,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 2,
            "block_num_heads": 2,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "intermediate_size": 48,
        },
        lambda d: {
            "input_ids": d.ints(32, 1, d.side, d.side),
            "encoder_hidden_states": d.words(16),
            "pooled_text_emb": d.n(1, 16),
            "micro_conds": d.t(1, 5),
        },
        returns=(),
    ),
    Entry(
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
        },
        lambda d: {"sample": d.image(4, 4), "timestep": d.t(), "encoder_hidden_states": d.words(16)},
    ),
    Entry("CogVideoXTransformer3DModel", _COG, _frames_first),
    Entry("LTXVideoTransformer3DModel", {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32,
          "num_layers": 5, "caption_channels": 16}, _ltx),
]  # fmt: skip
"""Structures that differ from one another; they run with the products on every test run."""

FAST = (*PRODUCTS, *STRUCTURES)
REST: list[Entry] = []


def all_entries() -> list[Entry]:
    """Every entry of the table."""
    return [*PRODUCTS, *STRUCTURES, *REST]


def entry(name: str) -> Entry:
    """The entry with the given id."""
    return next(e for e in all_entries() if e.id == name)
