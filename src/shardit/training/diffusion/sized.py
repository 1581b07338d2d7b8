"""The data of a run with the entries of the cache that its samples and captions have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image

from shardit.core.comm.group import GroupCoordinator
from shardit.training.data.buckets import Format
from shardit.training.data.dataset import Dataset, open_dataset
from shardit.training.data.order import Batch, Draw
from shardit.training.diffusion.batches import CachedSample
from shardit.training.diffusion.cache import Entry, SampleCache
from shardit.training.diffusion.components import Parts
from shardit.training.diffusion.encoding import Encoding
from shardit.training.diffusion.families.latents import condition_of, encoded
from shardit.training.diffusion.families.prompts import embedded, longest_prompt
from shardit.training.diffusion.families.table import call_default, grid
from shardit.training.settings import TrainSettings


class Sized:
    """Data and their entries in the cache."""

    def __init__(self, settings: TrainSettings, parts: Parts, data: Dataset):
        self.settings, self.parts, self.data = settings, parts, data
        self._longest = longest_prompt(parts.encoding, parts.own, settings.max_length)
        items = range(len(data.samples))
        self._latents = [self._latents_entry(item) for item in items]
        self._items = {entry.key: item for item, entry in zip(items, self._latents, strict=True)}
        captions = {sample.item.caption for sample in data.samples} | ({""} if settings.caption_dropout else set())
        self._prompts = {caption: self._prompt_entry(caption) for caption in sorted(captions)}
        self._captions = {entry.key: caption for caption, entry in self._prompts.items()}

    def _latents_entry(self, item: int) -> Entry:
        parts = self.parts
        made_of = {"item": self.data.key(item), "vae": parts.digests["vae"], "family": parts.family.pipeline}
        return Entry("latents", made_of, self.data.samples[item].item.name)

    def _prompt_entry(self, caption: str) -> Entry:
        made_of = {
            "caption": caption,
            "encoders": {name: one for name, one in self.parts.digests.items() if name not in ("vae", "scheduler")},
            "family": self.parts.family.pipeline,
            "longest": self._longest,
            "dtype": str(self.parts.dtype),
        }
        return Entry("prompts", made_of, f"caption {caption[:60]!r}")

    def fill_latents(self, cache: SampleCache, encoding: Encoding, ranks: GroupCoordinator) -> None:
        """Make the latents that the cache lacks. Collective."""
        cache.fill(self._latents, lambda entry: self._encoded(self._items[entry.key]), ranks, begin=encoding.load_vae)

    def fill_prompts(self, cache: SampleCache, encoding: Encoding, ranks: GroupCoordinator) -> None:
        """Make the embeddings of captions that the cache lacks. Collective."""
        family, pipe = self.parts.family, self.parts.encoding
        cache.fill(
            list(self._prompts.values()),
            lambda entry: embedded(family, pipe, self._captions[entry.key], self._longest),
            ranks,
            encoding.team,
            encoding.load_encoders,
        )

    def _encoded(self, item: int) -> dict[str, torch.Tensor]:
        pixels, pipe = self.data.pixels(item), self.parts.encoding
        given = condition_of(self.parts.family, pipe, pixels)
        named = {f"condition.{name}": tensor for name, tensor in given.items()}
        return {"latents": encoded(pipe.vae, pixels), **named}

    def step(self, step: int, replica: int, replicas: int) -> list[list[CachedSample]]:
        """Return the samples of each micro-batch of a replica in a step."""
        return self._samples(self.data.order.step(step, replica, replicas, self.settings.accumulation))

    def once(self) -> list[list[CachedSample]]:
        """Return micro-batches with each sample once, with seeds that stay."""
        return self._samples(self.data.order.once())

    def _samples(self, batches: Sequence[Batch]) -> list[list[CachedSample]]:
        return [
            [
                CachedSample(self._latents[draw.item], self._prompts[caption], caption, draw.seed, draw.name)
                for draw in batch.draws
                for caption in [self._caption(draw)]
            ]
            for batch in batches
        ]

    def _caption(self, draw: Draw) -> str:
        return "" if draw.drop_caption else self.data.samples[draw.item].item.caption

    def shown(self) -> dict[str, int]:
        """Return the size of samples, as arguments of the pipeline: the most frequent one of the data."""
        bucket, _ = Counter(sample.bucket for sample in self.data.samples).most_common(1)[0]
        frames = {"num_frames": bucket.frames} if self.parts.family.video else {}
        return {"width": bucket.width, "height": bucket.height, **frames}

    def first_frames(self, count: int) -> list[Image.Image]:
        """Return the first frames of samples of the data, for a model that is given one."""
        found = []
        for number in range(count):
            pixels = self.data.pixels(number % len(self.data.samples))[:, 0]
            found.append(Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()))
        return found


def own_size(parts: Parts) -> tuple[int, int, int]:
    """Return width, height and frames that the pipeline makes by default."""
    pipe, call = parts.encoding, type(parts.encoding)
    scale = int(getattr(pipe, "vae_scale_factor", 8))
    unet = getattr(pipe, "unet", None)
    side = getattr(pipe, "default_sample_size", None) or (unet.config.sample_size if unet is not None else None)
    usual = int(side) * scale if side else 1024
    width, height = (int(parts.own.get(name) or call_default(call, name) or usual) for name in ("width", "height"))
    frames = int(parts.own.get("num_frames") or call_default(call, "num_frames") or 1) if parts.family.video else 1
    return width, height, frames


def format_of(parts: Parts) -> Format:
    """Return the sizes and lengths that a pipeline takes."""
    multiple, apart = grid(parts.family, parts.encoding)
    width, height, frames = own_size(parts)
    if not parts.family.video:
        return Format(width, height, multiple)
    # A first latent frame that is given leaves nothing of a single frame to predict.
    least = 2 if parts.family.first_frame and parts.encoding.config.get("expand_timesteps") else 1
    return Format(width, height, multiple, frames, lambda count: count >= least and count % apart == 1 % apart)


def sized(settings: TrainSettings, parts: Parts, *, held_out: bool = False) -> Sized:
    """Open the data of the settings, or those of validation. Raises InputError."""
    return Sized(settings, parts, open_dataset(settings, format_of(parts), held_out=held_out))
