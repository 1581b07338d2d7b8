"""The share of parameters that stays whole on every tensor rank, by model: `python -m tests.support.whole_share`
writes the section of docs/supported-models.md, counted on meta with the default configurations of diffusers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardit.diffusion.family import FAMILY
from shardit.parallel.tensor.planner import plan_tensors
from tests.support.matrix_page import put_section
from tests.support.survey_models import find_class

SIZES = (2, 4)
"""Numbers of ranks."""

_LLAMA = {"patch_size": 2, "caption_channels": [4096, 4096], "llama_layers": list(range(48))}
_ROPE = {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}
_PRX = "diffusers.models.transformers.transformer_prx:PRXTransformer2DModel"

MODELS: dict[str, dict[str, Any]] = {
    "Flux2Transformer2DModel": {},
    "LTX2VideoTransformer3DModel": {},
    "Lumina2Transformer2DModel": {},
    _PRX: {},
    "ErnieImageTransformer2DModel": {},
    "SanaTransformer2DModel": {},
    "AuraFlowTransformer2DModel": {},
    "MochiTransformer3DModel": {},
    "HiDreamImageTransformer2DModel": _LLAMA,
    "CosmosTransformer3DModel": {},
    "Kandinsky5Transformer3DModel": {},
    "Krea2Transformer2DModel": {},
    "OmniGenTransformer2DModel": _ROPE,
    "StableAudio3DiTModel": {},
    "MiniMaxMusic3Transformer1DModel": {},
    "MiniMaxMusic3RVQDepthDecoder": {},
    "NucleusMoEImageTransformer2DModel": {},
    "WanTransformer3DModel": {},
    "WanVACETransformer3DModel": {},
    "SkyReelsV2Transformer3DModel": {},
    "QwenImageTransformer2DModel": {},
    "FluxTransformer2DModel": {},
    "HunyuanVideoTransformer3DModel": {},
    "HunyuanVideo15Transformer3DModel": {},
    "CogVideoXTransformer3DModel": {},
    "ChromaTransformer2DModel": {},
    "BriaTransformer2DModel": {},
    "ZImageTransformer2DModel": {},
    "SD3Transformer2DModel": {},
    "LTXVideoTransformer3DModel": {},
}
"""Arguments by class, where the default configuration leaves out what a model cannot be made without."""


@dataclass
class Whole:
    """What stays whole of a model: its number of parameters, the share by number of ranks, and the names with most of
    it, numbers of blocks left out."""

    parameters: int
    shares: dict[int, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def measure(name: str) -> Whole:
    """Plan a model on meta."""
    with torch.device("meta"):
        model: nn.Module = find_class(name)(**MODELS[name])
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    whole = Whole(sum(sizes.values()))
    for size in SIZES:
        plan = plan_tensors(model, size, FAMILY, must_cut=True)
        left = Counter[str]()
        for key in sizes.keys() - plan.cuts.keys():
            left[re.sub(r"(?<=\.)\d+(?=\.)", "*", key)] += sizes[key]
        whole.shares[size] = left.total() / whole.parameters
        whole.names = [key for key, number in left.most_common(2) if number > 1e-3 * whole.parameters]
    return whole


HEADING = "## What tensor ranks hold whole"

HEAD = f"""{HEADING}

Written by `python -m tests.support.whole_share`; not by hand. The share of a transformer's parameters that each of 2 or
4 tensor ranks holds whole, counted with the default configurations of diffusers (where one leaves out what the model
cannot be made without, that is added), and the largest modules of it.

"""


def render(found: dict[str, Whole]) -> str:
    """The section."""
    rows = [["class", "parameters", *(f"whole, tp {size}" for size in SIZES), "most of it"], ["---"] * 5]
    for name, whole in sorted(found.items(), key=lambda one: one[0].rpartition(":")[2]):
        names = ", ".join(f"`{key}`" for key in whole.names)
        shares = [f"{whole.shares[size]:.4f}" for size in SIZES]
        rows.append([name.rpartition(":")[2], f"{whole.parameters / 1e9:.1f} B", *shares, names])
    return HEAD + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
    section = render({name: measure(name) for name in MODELS})
    print(section)
    put_section(HEADING, section)
