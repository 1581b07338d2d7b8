"""Notes on arguments that a call has dropped."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shardit.diffusion.run.ineffective import ineffective


class Distilled:
    components: dict[str, Any] = {}

    def __call__(self, prompt: Any = None, negative_prompt: Any = None, true_cfg_scale: float = 1.0) -> None:
        """As Flux: its guidance_scale is an input of the model."""


class Guided:
    components: dict[str, Any] = {}

    def __init__(self, scale: float):
        self._scale = scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._scale > 1

    def __call__(self, prompt: Any = None, negative_prompt: Any = None, guidance_scale: float = 7.5) -> None:
        """As Stable Diffusion."""


class TwoScales:
    components: dict[str, Any] = {}

    def __call__(self, negative_prompt: Any = None, true_cfg_scale: float = 1.0, guidance_scale: float = 3.5) -> None:
        """As Flux, whose guidance_scale is an input of the transformer."""


class Unknown(Guided):
    @property
    def do_classifier_free_guidance(self) -> bool:
        raise AttributeError("_guidance_scale")


DROPPED = "the negative prompt has no effect without guidance: give a higher {}"


@pytest.mark.parametrize(
    ("pipe", "arguments", "note"),
    [
        (Distilled(), {"negative_prompt": "blurry"}, "true_cfg_scale"),
        (Distilled(), {"negative_prompt": "blurry", "true_cfg_scale": 1.0}, "true_cfg_scale"),
        (Distilled(), {"negative_prompt": "blurry", "true_cfg_scale": np.float32(1)}, "true_cfg_scale"),
        (Distilled(), {"negative_prompt_embeds": torch.ones(1)}, "true_cfg_scale"),
        (Distilled(), {"negative_prompt": "blurry", "true_cfg_scale": 3.0}, ""),
        (Distilled(), {"negative_prompt": ""}, ""),
        (TwoScales(), {"negative_prompt": "blurry"}, "true_cfg_scale"),
        (Distilled(), {}, ""),
        (Guided(1.0), {"negative_prompt": "blurry"}, "guidance_scale"),
        (Guided(7.5), {"negative_prompt": "blurry"}, ""),
        (Unknown(1.0), {"negative_prompt": "blurry"}, ""),
        (SimpleNamespace(components={}), {"negative_prompt": "blurry"}, ""),
    ],
)
def test_negative_prompts_without_guidance(pipe: Any, arguments: dict[str, Any], note: str) -> None:
    names = inspect.signature(pipe).parameters if callable(pipe) else {}
    assert ineffective(arguments, names, pipe) == ([DROPPED.format(note)] if note else [])


WITHOUT = "has no effect without guidance: give a higher guidance_scale"


class TwoExperts(Guided):
    config = SimpleNamespace(expand_timesteps=True)

    def __call__(
        self, guidance_scale: float = 5.0, guidance_scale_2: Any = None, cfg_norm: bool = False, last_image: Any = None
    ) -> None:
        """As Wan."""


@pytest.mark.parametrize(
    ("scale", "arguments", "notes"),
    [
        (
            1.0,
            {"guidance_scale_2": 7.0},
            ["guidance_scale_2 has no effect without guidance: give a higher guidance_scale"],
        ),
        (1.0, {"guidance_scale_2": None, "cfg_norm": False}, []),
        (1.0, {"cfg_norm": True}, [f"cfg_norm {WITHOUT}"]),
        (5.0, {"guidance_scale_2": 7.0, "cfg_norm": True}, []),
        (5.0, {"last_image": 1}, ["last_image has no effect with this model, which continues the first image alone"]),
        (5.0, {"last_image": None}, []),
    ],
)
def test_arguments_without_effect(scale: float, arguments: dict[str, Any], notes: list[str]) -> None:
    pipe = TwoExperts(scale)
    assert ineffective(arguments, inspect.signature(pipe).parameters, pipe) == notes


class Layers(Guided):
    def __init__(self, shifting: bool):
        super().__init__(7.0)
        self.scheduler = SimpleNamespace(config=SimpleNamespace(use_dynamic_shifting=shifting))

    def __call__(
        self,
        skip_guidance_layers: Any = None,
        skip_layer_guidance_scale: float = 2.8,
        enable_cfg_renorm: bool = True,
        cfg_renorm_min: float = 0.0,
        mu: Any = None,
    ) -> None:
        """As Stable Diffusion 3 and LongCat."""


@pytest.mark.parametrize(
    ("shifting", "arguments", "notes"),
    [
        (False, {"mu": 2.0}, ["mu has no effect with a scheduler without use_dynamic_shifting"]),
        (True, {"mu": 2.0}, []),
        (
            True,
            {"skip_layer_guidance_scale": 9.0},
            ["skip_layer_guidance_scale has no effect without skip_guidance_layers"],
        ),
        (True, {"skip_layer_guidance_scale": 9.0, "skip_guidance_layers": [0]}, []),
        (True, {"cfg_renorm_min": 0.5}, []),
        (
            True,
            {"cfg_renorm_min": 0.5, "enable_cfg_renorm": False},
            ["cfg_renorm_min has no effect without enable_cfg_renorm"],
        ),
        (True, {"enable_cfg_renorm": False}, []),
    ],
)
def test_arguments_that_need_others(shifting: bool, arguments: dict[str, Any], notes: list[str]) -> None:
    pipe = Layers(shifting)
    assert ineffective(arguments, inspect.signature(pipe).parameters, pipe) == notes
