"""The pipeline that is measured: a real WanPipeline with one real transformer of a chosen size, and its requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """The transformer and the work of one request.

    Pixels become latents by 8 in space and 4 in time, latents become tokens by 2 in space: 9 frames of 256 x 256 are
    3 x 16 x 16 = 768 tokens. `ffn` is twice the width, as in the tiny checkpoints: real ones have 2.7 to 4.7 times,
    which makes blocks dearer next to everything that shardit adds.
    """

    blocks: int = 16
    heads: int = 8
    head_dim: int = 64
    ffn: int = 1024
    pixels: int = 256
    frames: int = 9
    text_tokens: int = 64
    steps: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of one sample."""
        return ((self.frames - 1) // 4 + 1) * (self.pixels // 16) ** 2


FULL = Size()
SMALL = Size(blocks=4, heads=2, head_dim=32, ffn=128, pixels=64, frames=5, text_tokens=8, steps=2)


def fewer_tokens(size: Size) -> Size:
    """The same model with half the pixels on a side and two steps, for what is measured many times over."""
    return replace(size, pixels=max(64, size.pixels // 2), steps=2)


def write_model(size: Size, folder: str) -> None:
    """Write the diffusers folder: text encoder, tokenizer and VAE of tiny/wan2.2-t2v, and the transformer of `size`."""
    import torch

    from shardit.models.tiny.recipes.catalog import recipe
    from shardit.models.tiny.recipes.recipe import transformer
    from shardit.models.tiny.recipes.text import HIDDEN
    from shardit.models.tiny.writer import write_folder

    base = recipe("wan2.2-t2v")
    model = transformer(
        "WanTransformer3DModel",
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=HIDDEN,
        freq_dim=256,
        ffn_dim=size.ffn,
        num_layers=size.blocks,
        rope_max_seq_len=256,
    )
    parts = {**base.parts, "transformer": model, "transformer_2": None}
    wan = replace(base, parts=parts, config={"boundary_ratio": None})
    write_folder("bench-wan", wan, Path(folder), torch.float32)


def make_requests(size: Size, seeds: tuple[int, ...], guided: bool) -> list[Any]:
    """One request per seed, with embeddings instead of prompts and latents instead of pictures: only denoising runs."""
    import torch
    from diffusers import WanPipeline

    from shardit.diffusion.request.build import build_requests
    from shardit.diffusion.request.pipeline_signature import signature_of
    from shardit.models.tiny.recipes.text import HIDDEN

    def embeds(seed: int) -> torch.Tensor:
        return torch.randn(1, size.text_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))

    call = {
        "height": size.pixels,
        "width": size.pixels,
        "num_frames": size.frames,
        "num_inference_steps": size.steps,
        "guidance_scale": 4.0 if guided else 1.0,
        "output_type": "latent",
        **({"negative_prompt_embeds": embeds(1000)} if guided else {}),
    }
    return build_requests(
        [{"prompt_embeds": embeds(seed), "seed": seed} for seed in seeds],
        None,
        prompt=None,
        negative_prompt=None,
        pil_image=None,
        overrides=call,
        takes=signature_of(WanPipeline),
    )
