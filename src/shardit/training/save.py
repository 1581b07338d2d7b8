"""Saving of a trained model as one ordinary folder: of diffusers, of transformers, or a LoRA file."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from shardit.core.training.cut_loss import CutLoss
from shardit.core.training.gather import whole
from shardit.core.training.gradients.slices import TensorSlices
from shardit.errors import InputError, first_line
from shardit.loading.quiet import quiet

ADAPTER_MARKS = ("lora_", "modules_to_save")
"""Parts of the names of parameters of adapters."""

WEIGHTS = (
    "model-",
    "model.safetensors",
    "diffusion_pytorch_model",
    "adapter_model",
    "pytorch_lora_weights",
    "pytorch_model",
)
"""Beginnings of the names of files of weights, which belong together."""


def save_model(
    model: nn.Module,
    cut_loss: CutLoss,
    slices: TensorSlices,
    folder: Path,
    also: Callable[[Path], object] | None = None,
) -> str | None:
    """Save a model over the stages and tensor ranks of one replica; return what went wrong, on every stage of the first
    tensor rank. also: writes further files into the folder. Collective."""
    adapter = bool(getattr(model, "peft_config", None))
    problem = _mixture(model) if adapter else None
    if problem is not None:
        return problem
    comm = cut_loss.comm
    wanted: Callable[[str], bool] = _is_adapter if adapter else (lambda name: True)
    with whole(cut_loss.cut, cut_loss.holdings, comm, slices, wanted):
        if comm.rank == 0 and slices.index == 0:
            try:
                _replace(folder, _writer(model, adapter), also)
            except Exception as error:
                problem = f"{folder} cannot be written ({type(error).__name__}: {first_line(error)})"
    return comm.group.broadcast_object(problem, 0) if comm.size > 1 else problem


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in ADAPTER_MARKS)


def _mixture(model: nn.Module) -> str | None:
    """Return a warning if a model trains other weights next to its adapter, which its file would not have."""
    other = [name for name, p in model.named_parameters() if p.requires_grad and not _is_adapter(name)]
    if other:
        return f"{other[0]} is trained next to an adapter, whose file does not have it: freeze it, or train without one"
    return None


def _writer(model: Any, adapter: bool) -> Callable[[Path], None]:
    """Return what writes a model into a new folder, as its library does."""
    if adapter and type(model).__module__.partition(".")[0] == "diffusers":
        return lambda folder: _write_lora(model, folder)
    if adapter and type(model).__module__.partition(".")[0] == "peft":
        # peft asks the hub whether the embedding was resized, unless this is given.
        return lambda folder: model.save_pretrained(str(folder), save_embedding_layers=False)
    if hasattr(model, "save_pretrained"):
        return lambda folder: _write_quietly(model, folder)

    def plain(folder: Path) -> None:
        from safetensors.torch import save_model as save

        folder.mkdir()
        save(model, str(folder / "model.safetensors"))

    return plain


def _write_quietly(model: Any, folder: Path) -> None:
    with quiet():
        model.save_pretrained(folder)


def described_adapter(settings: Any) -> dict[str, Any]:
    """Return the configuration of an adapter for a LoRA file of diffusers. Dropout is of training only, and diffusers
    leaves that of a loaded adapter on, so the file has none."""
    return {**settings.to_dict(), "lora_dropout": 0.0}


def _write_lora(model: Any, folder: Path) -> None:
    """Write the LoRA file that `load_lora_weights` of diffusers' pipelines reads."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    if len(model.peft_config) > 1:
        raise InputError(f"the model has the adapters {', '.join(model.peft_config)}: delete all but one")
    adapter_name, settings = next(iter(model.peft_config.items()))
    component = "unet" if "UNet" in type(model).__name__ else "transformer"
    found = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {f"{component}.{name}": tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    described = {
        f"{component}.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in described_adapter(settings).items()
    }
    folder.mkdir()
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(described, indent=2, sort_keys=True, default=str)}
    save_file(tensors, folder / LORA_WEIGHT_NAME_SAFE, metadata=metadata)


def _replace(folder: Path, write: Callable[[Path], None], also: Callable[[Path], object] | None) -> None:
    """Write a folder under another name, and rename it when all of it is on the disk. What else the folder had stays,
    but for earlier weights."""
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError("it is a file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    partial, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    try:
        write(partial)
        if also is not None:
            also(partial)
        for path in (one for one in partial.rglob("*") if one.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            _keep_others(folder, partial)
            if _exchange(partial, folder):
                return
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders, so that at no moment there is none of that name; return whether the system
    can."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _keep_others(folder: Path, partial: Path) -> None:
    """Link all files of a folder except weights into the new one."""
    for entry in folder.iterdir():
        target = partial / entry.name
        if target.exists() or entry.name.startswith(WEIGHTS):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=os.link)
        else:
            os.link(entry, target, follow_symlinks=False)
