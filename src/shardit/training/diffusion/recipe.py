"""`recipe`: what a run of training needs of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.mesh import Mesh
from shardit.errors import InputError, UnsupportedError
from shardit.training.diffusion import components, files
from shardit.training.diffusion.adapters import add_lora, targets
from shardit.training.diffusion.batches import CachedSample, DiffusionBatches, Loss
from shardit.training.diffusion.cache import SampleCache
from shardit.training.diffusion.components import Parts
from shardit.training.diffusion.encoding import VAE, Encoding
from shardit.training.diffusion.families.table import FAMILIES, spatial_scale
from shardit.training.diffusion.joint import Joint
from shardit.training.diffusion.objectives import objective_of
from shardit.training.diffusion.samples import Prompt, Sampler, encode
from shardit.training.diffusion.sized import Sized, sized
from shardit.training.diffusion.timesteps import timesteps_for, usual_kind
from shardit.training.own_share import share_of, whole_note
from shardit.training.recipe import MicroBatch, TrainingRecipe
from shardit.training.settings import TrainSettings

if TYPE_CHECKING:
    from shardit.training.staged import Stages


def recipe(settings: TrainSettings, mesh: Mesh, config: DiffusionParallelConfig | None = None) -> TrainingRecipe:
    """Return the recipe of a diffusers pipeline. Collective: ranks share the making of the cache. config: None: each
    rank loads the whole trained models.

    Raises InputError and UnsupportedError, in one line.
    """
    if settings.sample_every and not settings.sample_prompts:
        raise InputError("sample_every needs sample_prompts: name at least one prompt")
    cache = SampleCache(_cache_folder(settings))
    ranks = GroupCoordinator.of_mesh(mesh)["world"]
    parts = components.prepare_parts(settings, mesh.device, ranks)
    _check(settings, parts)
    scheduler = parts.encoding.scheduler
    objective = objective_of(scheduler)
    kind = settings.timesteps or usual_kind(objective.flow, experts=len(parts.trained) > 1, shift=settings.shift)
    timesteps = timesteps_for(kind, settings.shift, scheduler, objective.flow)
    data = sized(settings, parts)
    held_out = sized(settings, parts, held_out=True) if settings.validation_data else None
    live = settings.train_text_encoder
    encoding = Encoding(parts, mesh, whole=live)
    _fill(cache, [one for one in (data, held_out) if one is not None], encoding, settings, ranks)
    batches = DiffusionBatches(cache, parts.family, objective, timesteps, parts.trained, parts.boundary, live)
    sampler = _sampler(settings, parts, data, mesh, ranks)
    kept = (*((VAE,) if sampler is not None else ()), *(parts.family.encoders if live else ()))
    components.release(parts, kept)
    share = share_of(config, settings.schedule, mesh)
    pipe = components.load_trained(settings, parts, mesh.device, share)
    whole = [note for name in parts.trained for note in whole_note(name, getattr(pipe, name), share)]
    pipe.register_modules(**{name: getattr(parts.encoding, name) for name in kept})
    if sampler is not None:
        sampler = replace(sampler, pipe=pipe)
    models, trained = _set_up(settings, parts, pipe)
    loss = Loss(parts.family, objective, type(pipe), _called_with(pipe), parts.dtype, mesh.device)
    notes = (*data.data.notes, timesteps.described(), *whole, *trained)
    return TrainingRecipe(
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


def _fill(
    cache: SampleCache, data: list[Sized], encoding: Encoding, settings: TrainSettings, ranks: GroupCoordinator
) -> None:
    """Make what the cache lacks, and load what samples and the training of encoders need in any case."""
    for one in data:
        one.fill_latents(cache, encoding, ranks)
    if not settings.sample_prompts:
        encoding.drop_vae()
    for one in data:
        one.fill_prompts(cache, encoding, ranks)
    if settings.sample_prompts:
        encoding.load_vae()
    if settings.sample_prompts or settings.train_text_encoder:
        encoding.load_encoders()


def _check(settings: TrainSettings, parts: Parts) -> None:
    """Raise an error for settings that the trained modules do not fit, before anything is encoded for hours."""
    if settings.train_text_encoder and settings.full:
        raise InputError("train_text_encoder adds a LoRA, so it does not go with full: leave one of them out")
    if settings.train_text_encoder and not parts.family.encoders:
        known = " and ".join(one.pipeline for one in FAMILIES if one.encoders)
        raise UnsupportedError(f"train_text_encoder: not with {parts.family.pipeline}, only with {known}; leave it out")
    for name in parts.trained:
        model = getattr(parts.encoding, name)
        if not settings.full:
            targets(model, settings.lora_targets)
        if settings.gradient_checkpointing and not getattr(model, "_supports_gradient_checkpointing", False):
            raise UnsupportedError(f"gradient_checkpointing: {type(model).__name__} has none; leave it out")


def _cache_folder(settings: TrainSettings) -> Path:
    if settings.cache is not None:
        return settings.cache
    if settings.output is None:
        raise InputError("output: name a folder for the run, or one for the cache (cache)")
    return settings.output / "cache"


def _micro_batches(batches: DiffusionBatches, groups: list[list[CachedSample]]) -> list[MicroBatch]:
    return [made for group in groups for made in batches.of(group)]


def _called_with(pipe: Any) -> dict[str, Any]:
    """Return the fields of a pipeline that its model's call depends on."""
    return {"expand_timesteps": bool(pipe.config.get("expand_timesteps")), "vae_scale": spatial_scale(pipe)}


def _set_up(settings: TrainSettings, parts: Parts, pipe: Any) -> tuple[dict[str, nn.Module], list[str]]:
    """Choose the weights that are trained; return the trained modules by name, and lines for the user."""
    models: dict[str, nn.Module] = {name: getattr(pipe, name) for name in parts.trained}
    notes = []
    for name in models:
        made = getattr(pipe, name)
        if settings.full:
            made.requires_grad_(True)
            count = sum(parameter.numel() for parameter in made.parameters())
            notes.append(f"{name}: all {count:,} weights are trained, in {str(made.dtype).removeprefix('torch.')}")
        else:
            notes.append(f"{name}: {add_lora(made, settings)}")
        if settings.gradient_checkpointing:
            made.enable_gradient_checkpointing()
    if settings.train_text_encoder:
        encoders = parts.family.encoders
        notes += [f"{name}: {add_lora(getattr(pipe, name).train(), settings, text=True)}" for name in encoders]
        models = {name: Joint(parts.family, pipe, name, encoders) for name in models}
    return models, notes


def _sampler(settings: TrainSettings, parts: Parts, data: Sized, mesh: Mesh, ranks: GroupCoordinator) -> Sampler | None:
    """Encode the prompts of the samples while the encoders are there; None if no samples are asked for."""
    if not settings.sample_prompts:
        return None
    arguments = {**parts.own, **dict(parts.family.shown), **data.shown()}
    images = data.first_frames(len(settings.sample_prompts)) if parts.family.first_frame else []
    prompts = []
    for number, text in enumerate(settings.sample_prompts):
        image: dict[str, Image.Image] = {"image": images[number]} if images else {}
        given = {**arguments, **image}
        live = settings.train_text_encoder
        prompts.append(Prompt(text, given) if live else encode(parts.encoding, text, given))
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
