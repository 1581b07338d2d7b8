"""Fills the owned part of a diffusers module from its checkpoint."""

from __future__ import annotations

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.core.placement.slices import Owned, Slice
from shardit.errors import InputError, listed
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.dtypes import file_dtype
from shardit.loading.safetensors_file import Reads, TensorEntry, read_slice

if TYPE_CHECKING:
    import torch
    from torch import nn

_CACHE_LINE = 64  # bytes; torch's own allocations start at multiples of it
_log = logging.getLogger("shardit")


@dataclass(frozen=True)
class Target:
    """One tensor of a module: all its names (tied weights have several; the first is the one in named_parameters), its
    key in the files (None: not there), and the present tensor of the module.

    part: the requested slice of it; None is all.
    """

    names: tuple[str, ...]
    key: str | None
    held: torch.Tensor
    part: Slice | None = None


def load_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    owned: Owned,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    reads: Reads | None = None,
    keys: Mapping[str, str] | None = None,
) -> nn.Module:
    """Fill the parameters and persistent buffers for which `owned(name)` is true; the others end up on meta. If it
    returns a Slice, the module gets a parameter of that shape, and only those bytes are read.

    `module` comes from `build` with the same `dtype`. Dtypes are those of diffusers' from_pretrained: floating tensors
    become `dtype` (float32 in modules that the class keeps in float32), others keep the module's dtype; with None all
    keep the module's dtype. Buffers outside the checkpoint go to `device`. `keys`: module name -> file key, by default
    that of diffusers. Returns the module in eval mode.
    Raises InputError, naming tensor and file, for missing tensors and wrong shapes.
    """
    import torch

    wanted = []
    for target in targets(module, checkpoint, keys):
        held = owned(target.names[0])
        if held:
            wanted.append(replace(target, part=held if isinstance(held, Slice) else None))
        else:
            place(module, target, torch.empty_like(target.held, device="meta", dtype=_dtype(module, target, dtype)))
    present = [target for target in wanted if target.key is not None]
    checkpoint.ensure({checkpoint.files[str(target.key)] for target in present}, reads)
    for file, group in _by_file(checkpoint, present):
        _read_file(module, checkpoint, file, group, dtype, torch.device(device), reads)
    finish(module, checkpoint, torch.device(device))
    return module


def finish(module: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
    """Finish a module after its tensors are filled: move buffers to the device, set the path in the configuration and
    eval mode."""
    move_buffers(module, device)
    _register_path(module, checkpoint)
    module.eval()


def targets(module: nn.Module, checkpoint: Checkpoint, keys: Mapping[str, str] | None = None) -> list[Target]:
    """Return the module's tensors and their file keys. Raises InputError for a parameter that is in no file."""
    keys = file_keys(module, checkpoint) if keys is None else keys
    held: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    found = []
    for names in tied_names(module):
        key = next((keys[name] for name in names if name in keys), None)
        if key is None and names[0] in parameters:
            raise InputError(
                f"{checkpoint.folder} has no tensor {names[0]} for {type(module).__name__} "
                f"(looked in {listed(checkpoint.names)}): weights and config.json do not belong together"
            )
        found.append(Target(tuple(names), key, held[names[0]]))
    _warn_unused(module, checkpoint, [name for name in keys if name not in held])
    return found


def tied_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter and persistent buffer; tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def names_of_stage(module: nn.Module, blocks: Sequence[str], owners: Sequence[int], stage: int) -> set[str]:
    """Return the names of parameters and persistent buffers that a stage needs: those of its blocks, and those outside
    of blocks. A tied one has several names, and is needed if any of these is."""
    others = tuple(f"{name}." for name, owner in zip(blocks, owners, strict=True) if owner != stage)
    return {name for tied in tied_names(module) for name in tied if any(not one.startswith(others) for one in tied)}


def check_tensors(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError for a parameter that is in no file and for tensors that do not fit, from headers alone."""
    for target in targets(module, checkpoint):
        if target.key is not None:
            path = checkpoint.folder / checkpoint.files[target.key]
            _checked_dtype(module, path, target, checkpoint.entry(target.key))


def file_keys(module: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Map module name -> file key, with the class's own hook for names of old checkpoints applied.

    diffusers calls the hook with single files only. The hook renames by moving entries of a dict, so its argument here
    is a dict from file key to file key.
    """
    keys: OrderedDict[str, str] = OrderedDict((key, key) for key in checkpoint.files)
    fix = getattr(module, "_fix_state_dict_keys_on_load", None)
    if fix is not None and not checkpoint.sharded:
        fix(keys)
    return keys


def _warn_unused(module: nn.Module, checkpoint: Checkpoint, unused: list[str]) -> None:
    expected: list[str] = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [])
    unused = [name for name in unused if not any(re.search(pattern, name) for pattern in expected)]
    if unused:
        _log.warning("%s: %s does not use %s", checkpoint.folder, type(module).__name__, listed(unused))


def _by_file(checkpoint: Checkpoint, wanted: list[Target]) -> Iterator[tuple[str, list[tuple[Target, TensorEntry]]]]:
    """Group the wanted tensors by file, in the order of the file's bytes."""
    groups: dict[str, list[tuple[Target, TensorEntry]]] = {}
    for target in wanted:
        key = str(target.key)
        groups.setdefault(checkpoint.files[key], []).append((target, checkpoint.entry(key)))
    for file in sorted(groups):
        yield file, sorted(groups[file], key=lambda pair: pair[1].start)


def _read_file(
    module: nn.Module,
    checkpoint: Checkpoint,
    file: str,
    group: list[tuple[Target, TensorEntry]],
    dtype: torch.dtype | None,
    device: torch.device,
    reads: Reads | None,
) -> None:
    """Read straight into each parameter if nothing has to be converted or moved, else through one buffer."""
    import torch

    path = checkpoint.folder / file
    kinds = [_checked_dtype(module, path, target, entry) for target, entry in group]
    plan = [(*pair, kind, _dtype(module, pair[0], dtype, kind)) for pair, kind in zip(group, kinds, strict=True)]
    shapes = [_shape(target, entry) for target, entry in group]
    staged = [
        math.prod(shape) * kind.itemsize
        for (_, _, kind, final), shape in zip(plan, shapes, strict=True)
        if kind != final or device.type != "cpu"
    ]
    # One buffer for all: buffers that come and go between the parameters would leave holes in the heap.
    buffer = torch.empty(max(staged, default=0), dtype=torch.uint8)
    for (target, entry, kind, final), shape in zip(plan, shapes, strict=True):
        nbytes = math.prod(shape) * kind.itemsize
        if kind == final and device.type == "cpu":
            tensor = as_mapped(entry.start, nbytes, final).view(shape)
            read_slice(path, entry, target.part, tensor, reads)
        else:
            tensor = torch.empty(shape, dtype=final, device=device)
            stage = buffer[:nbytes].view(kind).view(shape)
            read_slice(path, entry, target.part, stage, reads)
            tensor.copy_(stage)
        place(module, target, tensor)


def _shape(target: Target, entry: TensorEntry) -> tuple[int, ...]:
    """Return the shape of the requested part of a tensor."""
    return entry.shape if target.part is None else target.part.shape(entry.shape)


def as_mapped(start: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Return flat memory for bytes that begin at `start` of a file, aligned as in a memory-mapped file, which
    from_pretrained uses on the CPU.

    MKL's matrix products round differently for differently aligned operands, so equal alignment makes results equal.
    """
    import torch

    skew = start % _CACHE_LINE
    memory = torch.empty(skew + nbytes, dtype=torch.uint8)
    return memory[skew:].view(dtype)


def _checked_dtype(module: nn.Module, path: Path, target: Target, entry: TensorEntry) -> torch.dtype:
    """Return the dtype of a tensor in the file. Raises InputError for a wrong shape or a dtype that torch lacks."""
    if tuple(target.held.shape) != entry.shape:
        raise InputError(
            f"{path}: {target.key} has shape {list(entry.shape)}, but {type(module).__name__} needs "
            f"{list(target.held.shape)}: weights and config.json do not belong together"
        )
    stored = file_dtype(entry.dtype)
    if stored is None:
        raise InputError(f"{path}: {target.key} has format {entry.dtype}, which torch cannot read: use other weights")
    return stored


def _dtype(
    module: nn.Module, target: Target, dtype: torch.dtype | None, stored: torch.dtype | None = None
) -> torch.dtype:
    """Return the dtype that from_pretrained gives a tensor stored in the file as `stored` (by default: of the module's
    kind)."""
    import torch

    floating = (stored or target.held.dtype).is_floating_point
    if dtype is None or not floating:
        return target.held.dtype
    keep: Any = getattr(module, "_keep_in_fp32_modules", None) or []
    keep = [keep] if isinstance(keep, str) else keep
    return torch.float32 if any(part in target.names[0].split(".") for part in keep) else dtype


def place(module: nn.Module, target: Target, tensor: torch.Tensor) -> None:
    """Replace `target` in the module with a tensor, under every name (one tensor for tied weights)."""
    from torch import nn

    if isinstance(target.held, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=target.held.requires_grad)
    for name in target.names:
        parent, _, leaf = name.rpartition(".")
        home = module.get_submodule(parent)
        home_table: dict[str, Any] = home._parameters if isinstance(tensor, nn.Parameter) else home._buffers
        home_table[leaf] = tensor


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put the buffers that hold values on a device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[name] = buffer.to(device)


def _register_path(module: Any, checkpoint: Checkpoint) -> None:
    if hasattr(module, "register_to_config"):
        module.register_to_config(_name_or_path=str(checkpoint.folder))
