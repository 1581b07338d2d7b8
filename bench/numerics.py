"""How far each axis is from float64, next to plain diffusers: one forward of the measured model, relative L2."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.model import Size
from bench.ranks import Ranks

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stages": {"pipeline_parallel_size": 2},
    "guidance": {"cfg_parallel_size": 2},
    "Ulysses": {"ulysses_degree": 2},
    "Ring": {"ring_degree": 2},
    "slices": {"tensor_parallel_size": 2},
}
DTYPES = ("float32", "bfloat16")


def measure(size: Size) -> dict[str, dict[str, float]]:
    """dtype -> way -> distance from the forward in float64 of the same weights, rounded to that dtype before."""
    with tempfile.TemporaryDirectory() as folder, Ranks(2) as ranks:
        ranks.call("write_model", size, folder, on=(0,))
        return {
            dtype: {way: ranks.call("distance", folder, size, dtype, options)[0] for way, options in WAYS.items()}
            for dtype in DTYPES
        }


def distance(folder: str, size: Size, dtype: str, options: dict[str, Any], join: Any) -> float:
    """On a rank: the distance of one way. `join` starts the process group."""
    import torch
    from diffusers import WanTransformer3DModel

    import shardit
    from shardit.core.runtime.pending import materialize

    def load() -> Any:
        return WanTransformer3DModel.from_pretrained(Path(folder) / "transformer", torch_dtype=getattr(torch, dtype))

    model, exact = load().eval(), load().eval().to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.config.in_channels, (size.frames - 1) // 4 + 1, size.pixels // 8, size.pixels // 8)
    video = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    text = torch.randn(1, size.text_tokens, model.config.text_dim, generator=generator).to(getattr(torch, dtype))
    steps = torch.tensor([500])
    with torch.no_grad():
        expected = exact(video.double(), steps, text.double(), return_dict=False)[0]
        if options:
            join()
            shardit.parallelize(model, shardit.DiffusionParallelConfig(**options))
            materialize(model(video, steps, text, return_dict=False))  # the first call of a kind finds the plan
        got = model(video, steps, text, return_dict=False)[0] * 1
    return float((got.double() - expected).norm() / expected.norm())
