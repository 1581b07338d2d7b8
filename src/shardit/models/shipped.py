"""Configurations of real models that come with shardit, without weights: for `shardit inspect`.

Each folder in `configs/` is laid out like a diffusers repository: model_index.json and a config.json for each model.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "configs"

HUB_IDS = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "Wan2.2-T2V-A14B",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "Wan2.2-I2V-A14B",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "Wan2.2-TI2V-5B",
    "Qwen/Qwen-Image": "Qwen-Image",
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
    "stabilityai/stable-diffusion-3.5-large": "SD3.5-large",
}
"""Where the weights are that go with each."""


def names() -> list[str]:
    """The names of all configurations."""
    return sorted(HUB_IDS.values())


def shipped(model: str) -> Path | None:
    """The folder of the configuration of that name or hub id, or None."""
    name = HUB_IDS.get(model, model)
    return FOLDER / name if name in HUB_IDS.values() else None
