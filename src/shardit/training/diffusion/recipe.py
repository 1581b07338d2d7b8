"""`recipe`: what a run of training needs of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import nn

from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import Mesh
from shardit.errors import InputError, UnsupportedError
from shardit.training.diffusion import components, files
from shardit.training.diffusion.adapters import add_lora
from shardit.training.diffusion.batches import Batches, Loss, Sample
from shardit.training.diffusion.cache import Cache
from shardit.training.diffusion.components import Parts
from shardit.training.diffusion.families.table import spatial_scale
from shardit.training.diffusion.objectives import objective_of
from shardit.training.diffusion.samples import Sampler, encode
from shardit.training.diffusion.sized import Sized, sized
from shardit.training.diffusion.timesteps import timesteps_for, usual_kind
from shardit.training.recipe import MicroBatch, Recipe
from shardit.training.settings import TrainSettings

if TYPE_CHECKING:
    from shardit.training.staged import Stages


def recipe(settings: TrainSettings, mesh: Mesh) -> Recipe:
    """Return the recipe of a diffusers pipeline. Collective: ranks share the making of the cache.

    Raises InputError and UnsupportedError, in one line.
    """
    if settings.train_text_encoder:
        raise UnsupportedError("train_text_encoder: text encoders cannot be trained yet; leave it out")
    ranks = GroupCoordinator.of_mesh(mesh)["world"]
    parts = components.load_encoding(settings, mesh.device)
    scheduler = parts.encoding.scheduler
    objective = objective_of(scheduler)
    kind = settings.timesteps or usual_kind(objective.flow, experts=len(parts.trained) > 1, shift=settings.shift)
    timesteps = timesteps_for(kind, settings.shift, scheduler, objective.flow)
    cache = Cache(_cache_folder(settings))
    data = sized(settings, parts)
    held_out = sized(settings, parts, held_out=True) if settings.validation_data else None
    for one in (data, held_out):
        if one is not None:
            one.fill(cache, ranks)
    batches = Batches(cache, parts.family, objective, timesteps, parts.trained, parts.boundary)
    sampler = _sampler(settings, parts, data, mesh, ranks)
    components.release(parts.encoding, keep=("vae",) if sampler is not None else ())
    pipe = components.load_trained(settings, parts, mesh.device)
    if sampler is not None:
        pipe.register_modules(vae=parts.encoding.vae)
        sampler = replace(sampler, pipe=pipe)
    models = {name: getattr(pipe, name) for name in parts.trained}
    loss = Loss(parts.family, objective, type(pipe), _called_with(pipe), parts.dtype, mesh.device)
    notes = (*data.data.notes, timesteps.described(), *_set_up(settings, models))
    return Recipe(
        models,
        loss,
        lambda step, replica, replicas: _micro_batches(batches, data.step(step, replica, replicas)),
        data.data.order.per_epoch / settings.accumulation / mesh.sizes["dp"],
        {**data.data.identity(), "timesteps": timesteps.described(), "encoders": dict(parts.digests)},
        lambda stages, folder: _save(settings, parts, stages, folder, ranks),
        None if held_out is None else lambda: _micro_batches(batches, held_out.once()),
        sampler,
        notes,
    )


def _cache_folder(settings: TrainSettings) -> Path:
    if settings.cache is not None:
        return settings.cache
    if settings.output is None:
        raise InputError("output: name a folder for the run, or one for the cache (cache)")
    return settings.output / "cache"


def _micro_batches(batches: Batches, groups: list[list[Sample]]) -> list[MicroBatch]:
    return [made for group in groups for made in batches.of(group)]


def _called_with(pipe: Any) -> dict[str, Any]:
    """Return the fields of a pipeline that its model's call depends on."""
    return {"expand_timesteps": bool(pipe.config.get("expand_timesteps")), "vae_scale": spatial_scale(pipe)}


def _set_up(settings: TrainSettings, models: Mapping[str, nn.Module]) -> list[str]:
    """Choose the weights that are trained; return lines for the user."""
    notes = []
    for name, model in models.items():
        made: Any = model
        if settings.full:
            made.requires_grad_(True)
            count = sum(parameter.numel() for parameter in made.parameters())
            notes.append(f"{name}: all {count:,} weights are trained, in {str(made.dtype).removeprefix('torch.')}")
        else:
            notes.append(f"{name}: {add_lora(model, settings)}")
        if settings.gradient_checkpointing:
            if not getattr(made, "_supports_gradient_checkpointing", False):
                raise UnsupportedError(f"gradient_checkpointing: {type(made).__name__} has none; leave it out")
            made.enable_gradient_checkpointing()
    return notes


def _sampler(settings: TrainSettings, parts: Parts, data: Sized, mesh: Mesh, ranks: GroupCoordinator) -> Sampler | None:
    """Encode the prompts of the samples while the encoders are there; None if no samples are asked for."""
    if not settings.sample_prompts:
        if settings.sample_every:
            raise InputError("sample_every needs sample_prompts: name at least one prompt")
        return None
    arguments = {**parts.own, **dict(parts.family.shown), **data.shown()}
    pictures = data.first_frames(len(settings.sample_prompts)) if parts.family.first_frame else []
    prompts = []
    for number, text in enumerate(settings.sample_prompts):
        picture: dict[str, Image.Image] = {"image": pictures[number]} if pictures else {}
        prompts.append(encode(parts.encoding, text, {**arguments, **picture}))
    if not parts.family.casts and parts.dtype != parts.encoding.vae.dtype:
        parts.encoding.vae.to(parts.dtype)
    return Sampler(parts.encoding, prompts, settings.seed, settings.fps, mesh.device, ranks)


def _save(
    settings: TrainSettings, parts: Parts, stages: Mapping[str, Stages], folder: Path, ranks: GroupCoordinator
) -> None:
    if settings.full:
        files.save_pipeline(stages, parts.prepared.source.folder, folder, ranks)
    else:
        files.save_lora(stages, folder, ranks)
