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
        if self.name.startswith("transformers:"):
            model = cls(cls.config_class(**self.config)).eval()
        else:
            model = cls(**self.config).eval()
        return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter seeded random values: matrices that keep the scale, vectors near what they were."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim < 2 or not p.numel():
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

_HUNYUAN_DIT = {
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
}


def _hunyuan_dit(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.image(4),
        "timestep": d.t(),
        "encoder_hidden_states": d.n(1, 5, 16),
        "text_embedding_mask": d.mask(5, torch.float32),
        "encoder_hidden_states_t5": d.n(1, 4, 16),
        "text_embedding_mask_t5": d.mask(4, torch.float32),
        "image_meta_size": d.t(1, 6),
        "style": d.ints(1, 1),
        "image_rotary_emb": list(d.rope((d.side // 2) ** 2, 16)),
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
        _HUNYUAN_DIT,
        _hunyuan_dit,
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

_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
_BIG_UNET = {**_UNET, "block_out_channels": (8, 16, 16, 16), "attention_head_dim": 4}
_SDXL_UNET = {
    **_BIG_UNET,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
_UNET_3D = {
    **_UNET,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
_UNET_MOTION = {
    **_UNET,
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 4,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
_CHANNELS = {"in_channels": 4, "out_channels": 4}


def _unet(d: Draw) -> dict[str, Any]:
    return {"sample": d.image(4, 2), "timestep": d.t(), "encoder_hidden_states": d.words(16)}


def _residuals(d: Draw, *shapes: tuple[int, int], batch: int = 1) -> list[torch.Tensor]:
    """What a ControlNet or an adapter gives: random pictures of (channels, side in units of half a latent's)."""
    return [d.n(batch, channels, d.side * side // 2, d.side * side // 2) for channels, side in shapes]


_DOWN = ((8, 8), (8, 8), (8, 4), (16, 4), (16, 2), (16, 2), (16, 1), (16, 1))
"""What the down blocks of the UNet in `STRUCTURES` hand to its up blocks, as `_residuals` takes it."""
_SMALL_DOWN = ((8, 4), (8, 4), (8, 2), (16, 2))
"""The same of a UNet with two levels."""


def _big_unet(d: Draw) -> dict[str, Any]:
    return {"sample": d.image(4, 4), "timestep": d.t(), "encoder_hidden_states": d.words(16)}


def _control(d: Draw) -> dict[str, Any]:
    return {
        "down_block_additional_residuals": tuple(_residuals(d, *_DOWN)),
        "mid_block_additional_residual": d.n(1, 16, d.side // 2, d.side // 2),
    }


def _small_control(d: Draw, batch: int = 2) -> dict[str, Any]:
    return {
        "down_block_additional_residuals": tuple(_residuals(d, *_SMALL_DOWN, batch=batch)),
        "mid_block_additional_residual": d.n(batch, 16, d.side, d.side),
    }


def _adapter(d: Draw) -> dict[str, Any]:
    """One for each down block, in a list that the forward empties."""
    return {"down_intrablock_additional_residuals": _residuals(d, (8, 8), (16, 4), (16, 2), (16, 1))}


def _unet_video(d: Draw) -> dict[str, Any]:
    return {"sample": d.n(1, 4, 2, 2 * d.side, 2 * d.side), "timestep": d.t(), "encoder_hidden_states": d.words(16)}


def _sizes(d: Draw) -> dict[str, Any]:
    return {name: d.t(1, 2) for name in ("original_size", "target_size", "crop_coords")}


def _positions(d: Draw, start: int, count: int, axes: int = 3) -> torch.Tensor:
    """Positions of text, then of an image of `count` tokens."""
    out = torch.zeros(start + count, axes)
    out[start:, 1] = torch.arange(count) // d.side
    out[start:, 2] = torch.arange(count) % d.side
    return out


def _ltx2(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.n(1, 2 * d.side**2, 4),
        "audio_hidden_states": d.n(1, 3, 4),
        "encoder_hidden_states": d.words(16),
        "audio_encoder_hidden_states": d.words(16),
        "timestep": d.t(),
        "encoder_attention_mask": d.mask(),
        "audio_encoder_attention_mask": d.mask(),
        "num_frames": 2,
        "height": d.side,
        "width": d.side,
        "audio_num_frames": 3,
    }


_LTX2 = {
    **_HEADS,
    **_CHANNELS,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 5,
    "caption_channels": 16,
}


def _hunyuan_image(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.image(4),
        "timestep": d.t(),
        "encoder_hidden_states": d.words(16),
        "encoder_attention_mask": d.mask(),
        "guidance": d.t(),
    }


def _hunyuan15(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.video(4),
        "timestep": d.t(),
        "encoder_hidden_states": d.words(16),
        "encoder_attention_mask": d.mask(),
        "encoder_hidden_states_2": d.n(1, 4, 8),
        "encoder_attention_mask_2": d.mask(4),
        "image_embeds": torch.zeros(1, 3, 12),
    }


def _framepack(d: Draw) -> dict[str, Any]:
    return {
        **_hunyuan_video(d),
        "image_embeds": d.n(1, 3, 12),
        "indices_latents": torch.arange(2) + 4,
        "latents_clean": d.video(4),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": d.video(4, 2),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": d.video(4, 4),
        "indices_latents_history_4x": torch.arange(4),
    }


def _kandinsky6(d: Draw) -> dict[str, Any]:
    return {
        "hidden_states": d.n(1, 2, d.side, d.side, 9),
        "encoder_hidden_states": d.words(16),
        "pooled_projections": d.n(1, 8),
        "timestep": d.t(),
        "audio_hidden_states": d.n(1, 3, 4),
    }


def _minimax_h3(d: Draw) -> dict[str, Any]:
    text, audio, video = d.text, 3, d.side**2
    tags = torch.tensor([1] * text + [2] * audio + [0] * video)
    index = torch.arange(len(tags))
    return {
        "hidden_states": d.n(1, video, 16),
        "audio_hidden_states": d.n(1, audio, 6),
        "encoder_hidden_states": d.n(1, text, 16),
        "timestep": d.t(2) / 1000,
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": _positions(d, text + audio, video),
        "video_indices": index[tags == 0],
        "audio_indices": index[tags == 2],
        "text_indices": index[tags == 1],
    }


def _cosmos3(d: Draw) -> dict[str, Any]:
    length = 2 + d.side**2
    return {
        "input_ids": d.ints(32, 2),
        "text_indexes": torch.arange(2),
        "position_ids": torch.arange(length).expand(3, -1).clone(),
        "und_len": 2,
        "sequence_length": length,
        "vision_tokens": [d.n(1, 2, 1, d.side, d.side)],
        "vision_token_shapes": [(1, d.side, d.side)],
        "vision_sequence_indexes": torch.arange(2, length),
        "vision_mse_loss_indexes": torch.arange(2, length),
        "vision_timesteps": d.t().expand(d.side**2).clone() / 1000,
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


def _helios(d: Draw) -> dict[str, Any]:
    def history(frames: int) -> torch.Tensor:
        return d.n(1, 4, frames, 2 * d.side, 2 * d.side)

    return {
        **_wan(d),
        "hidden_states": history(2),
        "indices_hidden_states": torch.arange(2)[None] + 6.0,
        "indices_latents_history_short": torch.ones(1, 1),
        "indices_latents_history_mid": torch.ones(1, 2),
        "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": history(1),
        "latents_history_mid": history(2),
        "latents_history_long": history(4),
    }


def _ideogram4(d: Draw) -> dict[str, Any]:
    image = d.side**2
    text = torch.arange(d.text + image)[None] < d.text
    return {
        "hidden_states": d.n(1, d.text + image, 8) * ~text[..., None],
        "encoder_hidden_states": d.n(1, d.text + image, 16) * text[..., None],
        "timestep": d.t() / 1000,
        "position_ids": _positions(d, d.text, image).long()[None],
        "segment_ids": torch.ones(1, d.text + image, dtype=torch.long),
        "indicator": torch.where(text, 3, 2),
    }


def _omnigen(d: Draw) -> dict[str, Any]:
    image = (d.side // 2) ** 2
    length = 12 + 1 + image
    return {
        "hidden_states": d.image(4),
        "timestep": d.t() / 1000,
        "input_ids": d.ints(10, 1, 12),
        "input_img_latents": [d.image(4)],
        "input_image_sizes": {0: [[0, image]]},
        "attention_mask": torch.ones(1, length, length),
        "position_ids": torch.arange(length)[None],
    }


def _qwen21(d: Draw) -> dict[str, Any]:
    slots = d.side**2 // 4
    return {
        "hidden_states": d.tokens(8),
        "encoder_hidden_states": d.words(16),
        "encoder_hidden_states_mask": torch.ones(1, d.text, dtype=torch.long),
        "timestep": d.t() / 1000,
        "img_shapes": [[(1, d.side, d.side)]],
        "img_mask": (torch.arange(d.text + slots) >= d.text)[None],
    }


def _sana_wm(d: Draw) -> dict[str, Any]:
    pose = torch.eye(4).repeat(1, 4, 1, 1)
    pose[..., 2, 3] = torch.arange(4) * 0.1
    lens = torch.tensor([d.side, d.side, d.side / 2, d.side / 2]).expand(1, 4, 4)
    return {
        "hidden_states": d.video(4, 4),
        "timestep": d.t(1, 1, 4),
        "encoder_hidden_states": d.n(1, 1, 16, 8),
        "encoder_attention_mask": d.mask(16, torch.long),
        "camera_conditions": torch.cat([pose.flatten(-2), lens], -1),
        "chunk_plucker": d.video(8, 4),
    }


_WAN_ANIMATE = {
    **_WAN,
    "num_layers": 6,
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 16,
    "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}


def _wan_animate(d: Draw) -> dict[str, Any]:
    return {
        **_wan(d),
        "hidden_states": d.video(12, 3),
        "encoder_hidden_states_image": d.n(1, 4, 16),
        "pose_hidden_states": d.video(4, 2),
        "face_pixel_values": d.n(1, 3, 5, 16, 16),
    }


def _wan_animate_2(d: Draw) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [d.n(4, 2, d.side, d.side)],
        "timestep": d.t(),
        "encoder_hidden_states": [d.n(d.text, 16)],
        "condition_latents": [d.n(6, 2, d.side, d.side)],
        "encoder_hidden_states_image": d.n(1, 4, 1280),
        "kv_cache": WanAnimate2KVCache(4),
        "kv_cache_mode": "extract",
        "seq_len": 2 * (d.side // 2) ** 2,
        "offset_grid_sizes": torch.tensor([[2, d.side // 2, d.side // 2]]),
    }


def _rfd4(d: Draw) -> dict[str, Any]:
    length = d.side**2
    return {
        "bb_ca": d.n(1, length, 3),
        "local_latents": d.n(1, length, 8),
        "bb_ca_time": d.t() / 1000,
        "local_latents_time": d.t() / 1000,
        "padding_mask": d.mask(length),
        "conditioning": {
            "is_in_context_conditioning": ~d.mask(length),
            "supports_local_latent": d.mask(length),
        },
        "recycle_depth": 2,
    }


def _allegro_rope(d: Draw) -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    side = d.side // 2
    out = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (side, side)), grid_size=(side, side), temporal_size=2
    )
    return tuple(out[:3]), tuple(torch.cartesian_prod(*out[3:]).long().T.reshape(3, 1, -1).contiguous())


def _ids(d: Draw) -> dict[str, Any]:
    return {"input_ids": d.ints(32, 2, d.text), "attention_mask": d.mask(dtype=torch.long).expand(2, -1)}


_T5 = {"vocab_size": 32, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 5, "num_heads": 2}
_DECODER = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "use_cache": False,
    "pad_token_id": 0,
}
_TEXT_MODELS = [
    Entry("transformers:T5EncoderModel", _T5, _ids, returns=()),
    Entry("transformers:UMT5EncoderModel", _T5, _ids, returns=()),
    Entry("transformers:Qwen2Model", _DECODER, _ids, returns=()),
    Entry("transformers:Qwen3Model", _DECODER, _ids, returns=()),
    Entry("transformers:Qwen3ForCausalLM", _DECODER, _ids, returns=()),
    Entry(
        "transformers:Qwen3Model",
        _DECODER,
        lambda d: {**_ids(d), "output_hidden_states": True},
        returns=(),
        label="hidden",  # collected by hooks inside the blocks
        refused="ranks found different plans",
    ),
    Entry("transformers:LlamaModel", _DECODER, _ids, returns=()),
    Entry("transformers:Gemma2Model", _DECODER, _ids, returns=()),
    Entry(
        "transformers:CLIPTextModel",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "eos_token_id": 31,
        },
        _ids,
        returns=(),
    ),
]


REST: list[Entry] = [
    Entry(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": 16,
        },
        lambda d: {
            "hidden_states": d.tokens(4),
            "timestep": d.t() / 1000,
            "timestep_r": d.t() / 1000,
            "encoder_hidden_states": d.words(16),
            "context_latents": d.tokens(8),
        },
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 5,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        _text_image(4, 16),
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        {
            **_COG,
            "num_layers": 6,
            "is_train_face": True,
            "is_kps": False,
            "cross_attn_interval": 2,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 12,
            "LFE_vit_dim": 12,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 5,
        },
        lambda d: {**_frames_first(d), "id_cond": d.n(1, 12), "id_vit_hidden": [d.n(1, 3, 12) for _ in range(5)]},
    ),
    Entry(
        "DiTTransformer2DModel",
        {**_HEADS, **_CHANNELS, "num_layers": 5, "sample_size": 8, "norm_num_groups": 8},
        lambda d: {
            "hidden_states": d.image(4) if not d.big else d.n(2, 4, 4, 4),
            "timestep": d.t(),
            "class_labels": d.ints(1000, 2 if d.big else 1),
        },
    ),
    Entry(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 5,
            "num_attention_heads": 2,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 16,
        },
        lambda d: {
            **_text_image(4, 16)(d),
            "encoder_mask": d.mask(),
            "cross_attention_kwargs": {},
            "image_rotary_emb": torch.polar(torch.ones(192, 192, 8), d.n(192, 192, 8)),
        },
    ),
    Entry(
        "MiniMaxMusic3RVQDepthDecoder",
        {"hidden_size": 32, "num_layers": 5, "num_attention_heads": 2, "intermediate_size": 48, "audio_vocab_size": 16},
        lambda d: {"inputs_embeds": d.words(32)},
        returns=(),
    ),
    Entry(
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 5,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "sample_size": 8,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        _text_image(
            4,
            16,
            lambda d: {
                "encoder_attention_mask": d.mask(),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
    ),
    Entry(
        "PriorTransformer",
        {**_HEADS, "num_layers": 5, "embedding_dim": 12, "num_embeddings": 5, "additional_embeddings": 4},
        lambda d: {
            "hidden_states": d.n(2 if d.big else 1, 12),
            "timestep": d.t(2 if d.big else 1),
            "proj_embedding": d.n(2 if d.big else 1, 12),
            "encoder_hidden_states": d.n(2 if d.big else 1, 5, 12),
            "attention_mask": d.mask(5).expand(2 if d.big else 1, -1),
        },
    ),
    Entry(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
        },
        _text_image(4, 16, lambda d: {"encoder_attention_mask": d.mask()}),
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        _text_video(4, 16, lambda d: {"encoder_attention_mask": d.mask()}),
    ),
    Entry(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "caption_channels": 8,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 4,
        },
        _sana_wm,
    ),
    Entry(
        "diffusers.models.transformers.transformer_sana_wm_refiner:SanaWMLTX2RefinerTransformer3DModel",
        _LTX2,
        lambda d: {
            "hidden_states": d.n(1, d.side**2, 4),
            "encoder_hidden_states": d.words(16),
            "timestep": d.t(1, d.side**2),
            "video_rotary_emb": tuple(t[None] for t in d.rope(d.side**2, 32)),
            "encoder_attention_mask": d.mask(dtype=torch.float32),
        },
    ),
    Entry(
        "StableAudioDiTModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "num_layers": 5,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 16,
            "cross_attention_input_dim": 16,
        },
        lambda d: {
            "hidden_states": d.n(1, 4, d.side**2),
            "timestep": d.t(),
            "encoder_hidden_states": d.words(16),
            "global_hidden_states": d.n(1, 1, 16),
            "rotary_embedding": d.rope(d.side**2 + 1, 4),
        },
    ),
    Entry(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 5,
            "num_heads": 4,
            "cond_token_dim": 16,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2,
            "num_memory_tokens": 3,
        },
        lambda d: {
            "hidden_states": d.n(1, 4, d.side**2),
            "timestep": d.t() / 1000,
            "encoder_hidden_states": d.words(16),
            "global_hidden_states": d.n(1, 8),
            "encoder_attention_mask": d.mask(),
            "local_add_cond": d.n(1, 5, d.side**2),
        },
    ),
    Entry(
        "T5FilmDecoder",
        {"input_dims": 8, "targets_length": 64, "d_model": 32, "num_layers": 5, "num_heads": 2, "d_kv": 16, "d_ff": 48},
        lambda d: {
            "encodings_and_masks": [(d.words(32), d.mask(dtype=torch.float32)), (d.n(1, 3, 32), torch.ones(1, 3))],
            "decoder_input_tokens": d.tokens(8),
            "decoder_noise_time": d.t() / 1000,
        },
        returns=(),
    ),
    Entry(
        "Transformer2DModel",
        {**_HEADS, "in_channels": 8, "num_layers": 5, "norm_num_groups": 4, "cross_attention_dim": 16},
        lambda d: {"hidden_states": d.image(8), "encoder_hidden_states": d.words(16)},
    ),
    Entry(
        "diffusers.models.transformers.transformer_2d_dreamlite:DreamLiteTransformer2DModel",
        {**_HEADS, "in_channels": 32, "num_layers": 5, "norm_num_groups": 4, "cross_attention_dim": 16},
        lambda d: {"hidden_states": d.image(32), "encoder_hidden_states": d.words(16)},
    ),
    Entry(
        "TransformerTemporalModel",
        {**_HEADS, "in_channels": 8, "num_layers": 5, "norm_num_groups": 4},
        lambda d: {"hidden_states": d.n(4, 8, d.side, d.side), "num_frames": 2},
    ),
    Entry(
        "AllegroTransformer3DModel",
        {
            **_CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 5,
            "cross_attention_dim": 48,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 16,
        },
        _text_video(
            4,
            16,
            lambda d: {
                "timestep": d.t().long(),
                "attention_mask": torch.ones(1, 2, d.side, d.side),
                "encoder_attention_mask": d.mask(),
                "image_rotary_emb": _allegro_rope(d),
            },
        ),
    ),
    Entry(
        "AnyFlowTransformer3DModel",
        {**_WAN},
        lambda d: {
            "hidden_states": d.n(1, 2, 4, d.side, d.side),
            "timestep": d.t(1, 2),
            "r_timestep": d.t(1, 2),
            "encoder_hidden_states": d.words(16),
        },
    ),
    Entry(
        "AnyFlowFARTransformer3DModel",
        {**_WAN, "chunk_partition": (2, 2)},
        lambda d: {
            "hidden_states": d.n(1, 4, 4, 4 * d.side, 4 * d.side),
            "timestep": d.t(1, 4),
            "r_timestep": d.t(1, 4),
            "encoder_hidden_states": d.words(16),
            "chunk_partition": [2, 2],
        },
    ),
    Entry(
        "BriaTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": None, "axes_dims_rope": [4, 6, 6]},
        _flux,
    ),
    Entry(
        "BriaFiboTransformer2DModel",
        {**_FLUX, "pooled_projection_dim": None, "axes_dims_rope": [4, 6, 6], "text_encoder_dim": 12},
        lambda d: {**_flux(d), "text_encoder_layers": [d.words(12) for _ in range(8)]},
    ),
    Entry(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 5,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1, 3),
            "perceiver_num_layers": 2,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (16, 16, 16),
        },
        lambda d: {
            "hidden_states": d.image(4),
            "timestep": d.t() / 1000,
            "encoder_hidden_states": d.n(1, 3, d.text, 16),
            "context_latents": [d.n(1, 4, 4, 6)],
        },
    ),
    Entry(
        "ChromaTransformer2DModel",
        {
            **_FLUX,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        _flux,
    ),
    Entry("ChronoEditTransformer3DModel", _WAN, _wan),
    Entry(
        "CogView3PlusTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 16,
            "sample_size": 8,
        },
        _text_image(4, 16, _sizes),
    ),
    Entry(
        "CogView4Transformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "sample_size": 8,
            "rope_axes_dim": (16, 16),
        },
        _text_image(4, 16, _sizes),
    ),
    Entry(
        "CosmosTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (8, 16, 16),
            "concat_padding_mask": False,
        },
        _text_video(4, 16, lambda d: {"fps": 30}),
    ),
    Entry(
        "CosmosTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (8, 16, 16),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
            "controlnet_block_every_n": 2,
        },
        _text_video(
            4,
            16,
            lambda d: {
                "fps": 30,
                "block_controlnet_hidden_states": [d.n(1, 2 * (d.side // 2) ** 2, 32) for _ in range(3)],
            },
        ),
        label="control",
    ),
    Entry(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 8,
            "hidden_size": 32,
            "intermediate_size": 48,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "patch_latent_dim": 2,
            "rope_axes_dim": [2, 1, 1],
            "vocab_size": 32,
        },
        _cosmos3,
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "patch_size": 2,
            "num_layers": 5,
            "mmdit_layers": 3,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
        },
        _text_video(4, 16),
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 5,
            "ffn_hidden_size": 48,
            **_CHANNELS,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.image(4),
            "timestep": d.t(),
            "text_bth": d.words(16),
            "text_lens": torch.tensor([d.text - 1]),
        },
    ),
    Entry(
        "Flux2Transformer2DModel",
        {
            **_FLUX,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda d: {**_flux(d), **d.ids(4), "guidance": d.t() / 100},
    ),
    Entry(
        "Flux3Transformer2DModel",
        {**_FLUX, "cond_in_channels": 6, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        lambda d: {
            **_flux(d),
            **d.ids(4),
            "image_cond_hidden_states": d.n(1, 4, 6),
            "image_cond_ids": torch.ones(4, 4),
        },
    ),
    Entry(
        "GlmImageTransformer2DModel",
        {
            **_HEADS,
            **_CHANNELS,
            "num_layers": 5,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 32,
        },
        lambda d: {
            **_text_image(4, 16)(d),
            "prior_token_id": d.ints(32, 1, (d.side // 2) ** 2),
            "prior_token_drop": torch.zeros(1, (d.side // 2) ** 2, dtype=torch.bool),
            "target_size": d.t(1, 2),
            "crop_coords": d.t(1, 2),
        },
    ),
    Entry(
        "HeliosTransformer3DModel",
        {
            **{k: v for k, v in _WAN.items() if k != "rope_max_seq_len"},
            "rope_dim": (4, 6, 6),
        },
        _helios,
    ),
    Entry(
        "HunyuanImageTransformer2DModel", {**_HUNYUAN, "rope_axes_dim": (8, 8), "guidance_embeds": True}, _hunyuan_image
    ),
    Entry(
        "HunyuanVideo15Transformer3DModel",
        {
            **{k: v for k, v in _HUNYUAN.items() if k != "num_single_layers"},
            "num_layers": 5,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "target_size": 16,
            "task_type": "t2v",
        },
        _hunyuan15,
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **_HUNYUAN,
            "pooled_projection_dim": 8,
            "has_image_proj": True,
            "image_proj_dim": 12,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
    Entry(
        "Ideogram4Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 5,
            "intermediate_size": 48,
            "adaln_dim": 8,
            "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
        },
        _ideogram4,
    ),
    Entry(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 5,
            "rope_dim_list": [4, 6, 6],
        },
        lambda d: {
            "hidden_states": d.n(1, 2, 4, 1, d.side, d.side),
            "timestep": d.t(),
            "encoder_hidden_states": d.words(16),
        },
    ),
    Entry(
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 5,
            "rope_dim_list": [4, 6, 6],
        },
        lambda d: {
            "hidden_states": d.n(1, d.side**2, 4, 1, 2, 2),
            "timestep": d.t(),
            "encoder_hidden_states": d.words(16),
            "shape_list": [[(1, d.side, d.side // 2), (1, d.side, d.side // 2)]],
        },
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        {
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 2,
            "num_visual_blocks": 5,
            "axes_dims": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.n(1, 2, d.side, d.side, 4),
            "encoder_hidden_states": d.words(16),
            "timestep": d.t(),
            "pooled_projections": d.n(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(d.side // 2), torch.arange(d.side // 2)],
            "text_rope_pos": torch.arange(d.text),
        },
    ),
    Entry(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 2,
            "num_visual_blocks": 4,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        _kandinsky6,
    ),
    Entry(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_visual_blocks": 5,
            "axes_dims": (4, 6, 6),
        },
        lambda d: {"hidden_states": d.n(1, 1, 8, 16 if d.big else 8, 9), "timestep": d.t()},
    ),
    Entry(
        "Krea2Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "num_layers": 5,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 24,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda d: {
            "hidden_states": d.tokens(8),
            "encoder_hidden_states": d.n(1, d.text, 3, 16),
            "timestep": d.t() / 1000,
            "position_ids": _positions(d, d.text, d.side**2),
            "encoder_attention_mask": d.mask(),
        },
    ),
    Entry(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 5, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 8},
        lambda d: {
            "hidden_states": d.tokens(8),
            "encoder_hidden_states": d.words(16),
            "encoder_attention_mask": d.mask(),
            "timestep": d.t() / 1000,
            "attention_mask": torch.ones(1, d.side**2, dtype=torch.bool),
            "latent_cond": d.tokens(8),
        },
    ),
    Entry("LTX2VideoTransformer3DModel", _LTX2, _ltx2),
    Entry(
        "MiniMaxH3Transformer3DModel",
        {
            **_HEADS,
            "hidden_size": 32,
            "num_layers": 5,
            "num_refiner_layers": 2,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 16,
            "freq_dim": 8,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
    Entry(
        "MiniMaxMusic3Transformer1DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 5,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 8,
        },
        lambda d: {
            "hidden_states": d.n(1, 4, d.side**2),
            "timestep": d.t() / 1000,
            "encoder_hidden_states": d.tokens(16),
        },
    ),
    Entry(
        "MochiTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "num_layers": 5,
            "pooled_projection_dim": 16,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": 8,
        },
        _text_video(4, 16, lambda d: {"encoder_attention_mask": d.mask()}),
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 5,
            "num_decoder_layers": 2,
            "text_embed_dim": 16,
            "image_embed_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
        _text_video(4, 16, lambda d: {"encoder_attention_mask": d.mask()}),
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        {
            **_QWEN,
            "num_layers": 6,
            "num_experts": 4,
            "moe_intermediate_dim": 24,
            "capacity_factors": [2.0] * 6,
        },
        lambda d: {**_qwen(d), "img_shapes": [(1, d.side, d.side)], "encoder_hidden_states_mask": d.mask()},
    ),
    Entry(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 5,
            "pad_token_id": 0,
            "vocab_size": 64,
            "in_channels": 4,
            "time_step_dim": 8,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        _omnigen,
    ),
    Entry(
        "diffusers.models.transformers.transformer_prx:PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 5,
            "axes_dim": [8, 8],
        },
        _text_image(4, 16),
    ),
    Entry(
        "QwenImageTransformer2DModel",
        {**_QWEN, "num_layers": 5, "zero_cond_t": True},
        lambda d: {**_qwen(d), "hidden_states": d.n(1, 2 * d.side**2, 8), "img_shapes": [[(1, d.side, d.side)] * 2]},
        label="edit",
    ),
    Entry(
        "QwenImage21Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 5,
            "context_in_dim": 16,
            "mlp_ratio": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen21,
    ),
    Entry(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 5,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 8,
            "t_emb_dim": 8,
            "seq_sep_dim": 8,
            "tri_mult_c": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "feats_pair_cond": ("time_emb_bb_ca",),
        },
        _rfd4,
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        {**_WAN, "inject_sample_info": True},
        lambda d: {**_wan(d), "fps": torch.tensor([0])},
    ),
    Entry(
        "SkyReelsV2Transformer3DModel",
        {**_WAN, "num_frame_per_block": 2},
        lambda d: {**_wan(d), "timestep": d.t(1, 2), "enable_diffusion_forcing": True},
        label="forcing",
    ),
    Entry(
        "WanAnimateTransformer3DModel",
        _WAN_ANIMATE,
        _wan_animate,
        order=("blocks", "face_adapter"),
    ),
    Entry(
        "WanAnimateTransformer3DModel",
        _WAN_ANIMATE,
        _wan_animate,
        label="encoder-cut",
    ),
    Entry(
        "diffusers.models.transformers.transformer_wan_animate_2:WanAnimate2Transformer3DModel",
        {
            "text_len": 16,
            "in_dim": 10,
            "dim": 64,
            "ffn_dim": 96,
            "freq_dim": 32,
            "text_dim": 16,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 4,
        },
        _wan_animate_2,
    ),
    Entry(
        "ZImageTransformer2DModel",
        {**_Z, "siglip_feat_dim": 12},
        lambda d: {
            "x": [[d.n(4, 1, 4, 4), d.n(4, 1, d.side, d.side)]],
            "t": d.t() / 1000,
            "cap_feats": [[d.n(d.text, 24), d.n(d.text + 1, 24), d.n(d.text, 24)]],
            "siglip_feats": [[d.n(2, 2, 12), None]],
            "image_noise_mask": [[0, 1]],
        },
        label="omni",
    ),
    Entry(
        "UNet1DModel",
        {"sample_size": 32, "block_out_channels": (32, 32, 64), "extra_in_channels": 64},
        lambda d: {"sample": d.n(1, 2, 128 if d.big else 64), "timestep": d.t()},
    ),
    Entry(
        "UNet2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        lambda d: {"sample": d.image(4, 2), "timestep": d.t()},
    ),
    Entry(
        "UNet2DConditionModel",
        _BIG_UNET,
        lambda d: {
            "sample": d.image(4, 4),
            "timestep": d.t(),
            "encoder_hidden_states": d.words(16),
            "mid_block_additional_residual": d.n(1, 16, d.side // 2, d.side // 2),
        },
        label="residual",
    ),
    Entry(
        "UNet2DConditionModel",
        _BIG_UNET,
        lambda d: {**_big_unet(d), **_control(d)},
        label="controlnet",
    ),
    Entry(
        "UNet2DConditionModel",
        _BIG_UNET,
        lambda d: {**_big_unet(d), **_adapter(d)},
        label="adapter",
    ),
    Entry(
        "UNet2DConditionModel",
        {**_BIG_UNET, "mid_block_type": None},
        lambda d: {**_big_unet(d), **_control(d), **_adapter(d)},
        label="controlnet-adapter",
    ),
    Entry(
        "UNet2DConditionModel",
        _SDXL_UNET,
        lambda d: {
            **_unet(d),
            "down_block_additional_residuals": tuple(_residuals(d, (8, 4), (8, 4), (8, 2), (16, 2), (16, 1), (16, 1))),
            "mid_block_additional_residual": d.n(1, 16, d.side // 2, d.side // 2),
            "down_intrablock_additional_residuals": _residuals(d, (8, 2), (16, 2), (16, 1)),
            "added_cond_kwargs": {"text_embeds": d.n(1, 8), "time_ids": d.t(1, 6)},
        },
        label="sdxl-controlnet-adapter",
    ),
    Entry("UNet3DConditionModel", _UNET_3D, _unet_video),
    Entry(
        "UNet3DConditionModel",
        _UNET_3D,
        lambda d: {**_unet_video(d), **_small_control(d)},
        label="controlnet",
    ),
    Entry(
        "I2VGenXLUNet",
        {
            **_UNET,
            "block_out_channels": (64, 64),
            "cross_attention_dim": 64,
            "num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda d: {
            **_unet_video(d),
            "encoder_hidden_states": d.words(64),
            "fps": torch.tensor([2.0]),
            "image_latents": d.n(1, 4, 2, 2 * d.side, 2 * d.side),
            "image_embeddings": d.n(1, 64),
        },
    ),
    Entry(
        "Kandinsky3UNet",
        {
            "in_channels": 4,
            "time_embedding_dim": 16,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
        lambda d: {**_unet(d), "encoder_attention_mask": d.mask()},
    ),
    Entry(
        "UNetMotionModel",
        _UNET_MOTION,
        lambda d: {**_unet_video(d), "encoder_hidden_states": d.n(2, d.text, 16)},
    ),
    Entry(
        "UNetMotionModel",  # AnimateDiff with ControlNet or SparseCtrl
        _UNET_MOTION,
        lambda d: {**_unet_video(d), "encoder_hidden_states": d.n(2, d.text, 16), **_small_control(d)},
        label="controlnet",
    ),
    Entry(
        "HunyuanDiT2DModel",
        _HUNYUAN_DIT,
        lambda d: {**_hunyuan_dit(d), "controlnet_block_samples": [d.n(1, (d.side // 2) ** 2, 32) for _ in range(2)]},
        returns=(),
        label="controlnet",
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "pooled_projection_dim": 8, "image_condition_type": "token_replace"},
        _hunyuan_video,
        label="token-replace",
    ),
    Entry(
        "UNetSpatioTemporalConditionModel",
        {
            **{k: v for k, v in _UNET.items() if k != "norm_num_groups"},
            "block_out_channels": (32, 64),
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        lambda d: {
            "sample": d.n(1, 2, 8, 2 * d.side, 2 * d.side),
            "timestep": d.t(),
            "encoder_hidden_states": d.n(1, 1, 16),
            "added_time_ids": d.t(1, 3),
        },
    ),
    Entry(
        "diffusers.models.unets.unet_stable_cascade:StableCascadeUNet",
        {
            **_CHANNELS,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "clip_text_pooled_in_channels": 12,
            "clip_seq": 2,
        },
        lambda d: {"sample": d.image(4, 2), "timestep_ratio": d.t() / 1000, "clip_text_pooled": d.n(1, 1, 12)},
    ),
    *_TEXT_MODELS,
]
"""All other classes."""


def all_entries() -> list[Entry]:
    """Every entry of the table."""
    return [*PRODUCTS, *STRUCTURES, *REST]


def entry(name: str) -> Entry:
    """The entry with the given id."""
    return next(e for e in all_entries() if e.id == name)
