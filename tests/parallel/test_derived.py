"""Components of classes that are derived from known ones: recognised, and cut where they add no code of their own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from torch import nn
from transformers import CLIPTextModel

import shardit
from shardit import DiffusionParallelConfig
from shardit.core.placement.assignment import assign
from shardit.diffusion.family import FAMILY
from shardit.diffusion.roles import encodes, is_vae, own_code, roles_of
from shardit.parallel.tensor.apply import plan_components
from shardit.parallel.tensor.planner import plan_tensors
from tests.diffusion.test_parallelize import join
from tests.pipelines.entry import entries
from tests.pipelines.runs import arrays_of, distance
from tests.support.encoder_models import ENCODERS
from tests.support.ranks import run_ranks
from tests.support.survey_models import entry


class Brighter(AutoencoderKL):
    """Does something else in a method that pipelines call."""

    def decode(self, z: Any, *args: Any, **kwargs: Any) -> Any:
        return super().decode(z * 1.3, *args, **kwargs)


class Alias(CLIPTextModel):
    """Has nothing of its own."""


class Reading(CLIPTextModel):
    """Reads weights of its parts, which would be slices, or on another rank."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out: Any = super().forward(*args, **kwargs)
        ids = args[0] if args else kwargs["input_ids"]
        table: Any = self.get_input_embeddings()
        scale = 1 + self.get_parameter("encoder.layers.1.mlp.fc1.weight").mean()
        out.last_hidden_state = out.last_hidden_state * scale + table.weight[ids]
        return out


class Renamed(LTXVideoTransformer3DModel):
    """Derived from a model of which it is known that its rotary tables differ by head."""


AXES: tuple[dict[str, Any], ...] = (
    {"pipeline_parallel_size": 2, "vae_patch_parallel_size": 2},
    {"cfg_parallel_size": 2},
    {"tensor_parallel_size": 2, "vae_patch_parallel_size": 2},
)


def pipeline(encoder: type) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = entries()["StableDiffusionPipeline"].build()
    pipe.vae.__class__, pipe.text_encoder.__class__ = Brighter, encoder
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any) -> Any:
    call = {**entries()["StableDiffusionPipeline"].call(), "height": 32, "width": 32}
    return arrays_of(pipe(**call, generator=torch.Generator().manual_seed(1)))


def on_ranks(rank: int, count: int, method: str) -> list[float]:
    join(rank, count, method)
    found = []
    for encoder in (Alias, Reading):
        expected = run(pipeline(encoder))
        for axes in AXES:
            pipe = pipeline(encoder)
            shardit.parallelize(pipe, DiffusionParallelConfig(**axes, split_batch=False), timeout_s=60)
            found.append(distance(expected, run(pipe)))
            if "tensor_parallel_size" in axes:
                assert hasattr(pipe.text_encoder, "shardit_checks") == (encoder is Alias)
    return found


def test_derived_classes_give_the_same() -> None:
    for errors in run_ranks(2, on_ranks):
        assert max(errors) <= 1e-5, errors


def test_derived_classes_are_recognised() -> None:
    clip = next(e for e in ENCODERS if e.name == "CLIPTextModel")
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"vae": Brighter(), "plain": clip.build(), "alias": clip.build()}
        modules["reading"] = clip.build()
    modules["alias"].__class__, modules["reading"].__class__ = Alias, Reading
    assert is_vae(modules["vae"])
    assert [encodes(module) for module in modules.values()] == [False, True, True, True]
    assert [own_code(module) for module in modules.values()] == [Brighter, None, None, Reading]
    assert roles_of(modules).tiled == ("vae",)
    assert plan_components(modules, roles_of(modules), 2, FAMILY).keys() == {"plain", "alias"}
    del modules["vae"]
    config = DiffusionParallelConfig(pipeline_parallel_size=2)
    found = assign(modules, roles_of(modules, StableDiffusionPipeline), config, environ={})
    assert found.layerwise.keys() == {"plain", "alias"}
    assert "reading is whole on one rank: Reading has methods of its own, which may read any of its weights" in (
        found.notes
    )


def test_notes_of_a_class_apply_to_derived_classes() -> None:
    ltx = entry("LTXVideoTransformer3DModel").build()
    ltx.__class__ = Renamed
    roles = plan_tensors(ltx, 2, FAMILY).roles
    assert roles["transformer_blocks.0.attn1"].tables == ("image_rotary_emb",)
