"""Micro-batches from the cache: latents, prompts, timesteps and the seeds of the noise of their samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.training.diffusion.cache import Entry, SampleCache
from shardit.training.diffusion.families.predictions import Inputs
from shardit.training.diffusion.families.prompts import joined
from shardit.training.diffusion.families.table import TrainingFamily
from shardit.training.diffusion.joint import Joint
from shardit.training.diffusion.noise import noise_of, uniform_of
from shardit.training.diffusion.objectives import Objective
from shardit.training.diffusion.timesteps import Timesteps
from shardit.training.recipe import MicroBatch


@dataclass(frozen=True)
class CachedSample:
    """One sample of a step: its entries in the cache, its caption, the seed of its noise and timestep, its name."""

    latents: Entry
    prompt: Entry
    caption: str
    seed: int
    name: str


@dataclass(frozen=True)
class DiffusionBatches:
    """Makes micro-batches. models: names of the trained modules; with two, samples with timesteps from the `boundary`
    on are for the first, others for the second."""

    cache: SampleCache
    family: TrainingFamily
    objective: Objective
    timesteps: Timesteps
    models: tuple[str, ...]
    boundary: float | None
    live_prompts: bool = False

    def of(self, samples: Sequence[CachedSample]) -> list[MicroBatch]:
        """Return one micro-batch for each model that has samples among these, which have latents of one size."""
        latents = [self.cache.read(sample.latents) for sample in samples]
        times = [self._time(sample, one["latents"]) for sample, one in zip(samples, latents, strict=True)]
        of_model: dict[str, list[int]] = {}
        for place, time in enumerate(times):
            of_model.setdefault(self._model(time), []).append(place)
        return [
            self._batch(name, [samples[n] for n in places], [latents[n] for n in places], [times[n] for n in places])
            for name, places in of_model.items()
        ]

    def _batch(
        self, model: str, samples: list[CachedSample], latents: list[dict[str, torch.Tensor]], times: list[float]
    ) -> MicroBatch:
        stacked = {name: torch.stack([one[name] for one in latents]) for name in latents[0]}
        data = {
            "latents": stacked.pop("latents"),
            "condition": {name.removeprefix("condition."): tensor for name, tensor in stacked.items()},
            "text": self._text(samples),
            "times": torch.tensor(times, dtype=torch.float32),
            "seeds": torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
        }
        return MicroBatch(model, data, float(len(samples)), tuple(sample.name for sample in samples))

    def _text(self, samples: list[CachedSample]) -> dict[str, Any]:
        """Return the embeddings of prompts, or the captions themselves for text encoders that are trained."""
        if self.live_prompts:
            return {"captions": [sample.caption for sample in samples]}
        return joined(self.family, [self.cache.read(sample.prompt) for sample in samples])

    def _time(self, sample: CachedSample, latents: torch.Tensor) -> float:
        """Return the timestep of a sample, which follows from its seed."""
        tokens = latents[0].numel() // self.family.token**2
        return self.objective.timestep(self.timesteps.quantile(uniform_of(sample.seed), tokens))

    def _model(self, time: float) -> str:
        return self.models[0 if self.boundary is None or time >= self.boundary else 1]


@dataclass(frozen=True)
class Loss:
    """The loss of a model for the data of a micro-batch: the mean squared error of its prediction."""

    family: TrainingFamily
    objective: Objective
    pipeline: Any
    settings: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, model: nn.Module, data: Any) -> torch.Tensor:
        clean, times = data["latents"].to(self.device), data["times"].to(self.device)
        noise = noise_of(data["seeds"], clean.shape[1:]).to(self.device)
        noised = self.objective.noised(clean, noise, times)
        text = model.prompts(data["text"]["captions"], self.device) if isinstance(model, Joint) else data["text"]
        text, condition = self._given(text), self._given(data["condition"])
        given = Inputs(noised.to(self.dtype), times, text, condition, self.pipeline, dict(self.settings))
        made = self.family.predict(model, given).float()
        errors = (made - self.objective.target(clean, noise, times)) ** 2
        if "free" in condition:  # what is given is not predicted
            free = condition["free"].float().expand_as(errors)
            return ((errors * free).flatten(1).sum(1) / free.flatten(1).sum(1)).mean()
        return errors.mean()

    def _given(self, value: Any) -> Any:
        """Return tensors on the device, floating ones in the type of the model."""
        if isinstance(value, dict):
            return {name: self._given(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._given(one) for one in value]
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
