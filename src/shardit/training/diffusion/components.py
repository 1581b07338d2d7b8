"""Loading of a pipeline for training: first its configuration, for what encodes, later what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.comm.group import GroupCoordinator
from shardit.diffusion.loading.pipeline import Prepared, load_pipeline, prepare
from shardit.diffusion.roles import denoises
from shardit.errors import InputError, UnsupportedError
from shardit.loading.dtypes import as_dtype
from shardit.loading.source import locate
from shardit.models import tiny
from shardit.training.diffusion.cache import digest_of_files
from shardit.training.diffusion.families.latents import check_vae
from shardit.training.diffusion.families.table import TrainingFamily, check_model, family_of
from shardit.training.own_share import Share
from shardit.training.settings import TrainSettings

_TINY = "tiny/"


@dataclass
class Parts:
    """A pipeline for training.

    encoding: the pipeline that encodes; its modules are on meta until they are loaded from `prepared`. dtype: of the
    trained weights. own: default arguments of a tiny model. digests: of the folders of the other components.
    """

    family: TrainingFamily
    prepared: Prepared
    encoding: Any
    trained: tuple[str, ...]
    dtype: torch.dtype
    own: dict[str, Any]
    digests: dict[str, str]

    @property
    def boundary(self) -> float | None:
        """The timestep from which on the first expert is trained; None with one model."""
        share = self.encoding.config.get("boundary_ratio") if len(self.trained) == 2 else None
        return None if share is None else share * self.encoding.scheduler.config.num_train_timesteps


def prepare_parts(settings: TrainSettings, device: torch.device, ranks: GroupCoordinator) -> Parts:
    """Build a pipeline without weights. Collective; raises InputError and UnsupportedError."""
    found = prepare(settings.model)
    family = family_of(found.cls)
    trained = tuple(name for name, module in found.modules.items() if denoises(name, module))
    dtype = _dtype(settings, found, trained)
    locate(settings.model)  # with its weights: their contents decide the names of cached entries
    prepared = prepare(settings.model, dtype={"default": str(dtype).removeprefix("torch."), "vae": "float32"})
    pipe = load_pipeline(prepared, dict.fromkeys(prepared.modules, _nothing), device=device)
    check_model(family, pipe)
    check_vae(pipe.vae)
    own = tiny.filled_in(settings.model.removeprefix(_TINY), ()) if settings.model.startswith(_TINY) else {}
    others = {name: part.folder for name, part in prepared.parts.items() if name not in trained}
    digests = {name: digest_of_files(folder) for name, folder in others.items()} if ranks.is_first_rank else None
    parts = Parts(family, prepared, pipe, trained, dtype, own, ranks.broadcast_object(digests))
    if len(trained) == 2 and parts.boundary is None:
        raise UnsupportedError(f"{found.cls.__name__} has {' and '.join(trained)} but no boundary_ratio")
    return parts


def load_trained(settings: TrainSettings, parts: Parts, device: torch.device, share: Share) -> Any:
    """Load the pipeline with this rank's share of its trained modules and nothing else that has weights."""
    prepared = prepare(settings.model, dtype=str(parts.dtype).removeprefix("torch."))
    others = {name: _nothing for name in prepared.modules if name not in parts.trained}
    for name in parts.trained:
        prepared.modules[name].requires_grad_(settings.full)  # what is trained decides where blocks are placed
    shares = {name: share(prepared.modules[name]) for name in parts.trained}
    pipe = load_pipeline(prepared, {**others, **shares}, device=device)
    pipe.register_modules(**dict.fromkeys(others))
    pipe.set_progress_bar_config(disable=True)
    for name in parts.trained:
        getattr(pipe, name).train()
    return pipe


def release(parts: Parts, keep: tuple[str, ...] = ()) -> None:
    """Drop the modules of the pipeline that encodes, but for those to keep."""
    pipe = parts.encoding
    modules = [name for name, one in pipe.components.items() if isinstance(one, nn.Module)]
    pipe.register_modules(**{name: None for name in modules if name not in keep})
    parts.prepared.modules.clear()


def _nothing(_: str) -> bool:
    return False


def _dtype(settings: TrainSettings, prepared: Prepared, trained: tuple[str, ...]) -> torch.dtype:
    """Return the type of the weights: that of the settings; else bfloat16 if the folder has it, else float32."""
    chosen = as_dtype(settings.dtype)
    if chosen is torch.float16:
        raise InputError("dtype='float16' loses small gradients: use bfloat16 or float32")
    if chosen is not None:
        return chosen
    stored: Callable[[str], Any] = lambda name: getattr(prepared.checkpoints[name], "stored_dtype", None)  # noqa: E731
    return torch.bfloat16 if all(stored(name) is torch.bfloat16 for name in trained) else torch.float32
