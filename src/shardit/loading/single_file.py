"""Loads one weight file in the original format of a model by diffusers' own conversion, for owned tensors only.

The conversion runs once on tensors without data and is recorded: for each tensor of the model, its source tensors in
the file and the operations. Only owned tensors are then read and computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from shardit.core.placement.slices import Owned, Slice
from shardit.errors import InputError, first_filled_line
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.dtypes import file_dtype
from shardit.loading.safetensors_file import Reads, read_slice
from shardit.loading.weights import as_mapped, finish, place, targets

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Original(Checkpoint):
    """A file with a component in another format than diffusers'."""

    config: Mapping[str, Any] = field(default_factory=dict)
    _converted: Converted | None = None

    @classmethod
    def at(cls, path: str, config: Mapping[str, Any]) -> Original:
        """Open the file at `path` for a model of this configuration. Raises InputError if it cannot be read."""
        file = Path(path)
        opened = cls(file.parent, {}, False, config=config)
        opened.files = dict.fromkeys(opened.header(file.name).entries, file.name)
        return opened

    @property
    def name(self) -> str:
        """The path, for errors."""
        return str(self.folder / next(iter(self.files.values()), ""))

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor in the file."""
        found = file_dtype(self.entry(key).dtype)
        if found is None:
            raise InputError(f"{self.name}: {key} has a format that torch cannot read; use other weights")
        return found

    def empty(self, key: str) -> torch.Tensor:
        """Return a tensor of the file, on meta."""
        return torch.empty(self.entry(key).shape, dtype=self.dtype(key), device="meta")

    def converted(self, module: nn.Module) -> Converted:
        """Convert the file on meta and return the result. Raises InputError if the file does not contain the module."""
        if self._converted is None:
            self._converted = _convert(module, self)
        return self._converted


@dataclass
class Converted:
    """The model's tensors by name, on meta; the operations that made them; and the keys of tensors taken from the
    file."""

    tensors: dict[str, torch.Tensor]
    keys: dict[int, str]
    calls: dict[int, tuple[Any, Any, Any, int]]
    kept: list[Any]
    """Keeps every object alive whose id is a key above."""

    def value(self, tensor: torch.Tensor, read: Any, known: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return the data of a tensor: `read(key)` if it is in the file, else the result of its recorded operations."""
        if id(tensor) not in known:
            if id(tensor) in self.keys:
                known[id(tensor)] = read(self.keys[id(tensor)])
            elif id(tensor) in self.calls:
                func, args, kwargs, place = self.calls[id(tensor)]
                args, kwargs = tree_map(lambda leaf: self._argument(leaf, read, known), (args, kwargs))
                known[id(tensor)] = tree_flatten(func(*args, **kwargs))[0][place]
            else:
                return tensor  # a constant of the conversion
        return known[id(tensor)]

    def _argument(self, leaf: Any, read: Any, known: dict[int, torch.Tensor]) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self.value(leaf, read, known)
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


class _Watch(TorchDispatchMode):
    """Records the operation that made each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, tuple[Any, Any, Any, int]] = {}
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} writes into a tensor")
        out = func(*args, **(kwargs or {}))
        self.kept += [args, kwargs, out]
        for position, leaf in enumerate(tree_flatten(out)[0]):
            if isinstance(leaf, torch.Tensor):
                self.calls[id(leaf)] = (func, args, kwargs or {}, position)
        return out


def _convert(module: nn.Module, original: Original) -> Converted:
    from diffusers.loaders import single_file_model as library

    kind = loadable(type(module))
    if kind is None:
        raise InputError(
            f"{original.name}: diffusers has no conversion of single files for {type(module).__name__}; it has some "
            f"for {', '.join(library.SINGLE_FILE_LOADABLE_CLASSES)}"
        )
    given = {key: original.empty(key) for key in original.files}
    keys = {id(tensor): key for key, tensor in given.items()}
    kept: list[Any] = list(given.values())
    watch = _Watch()
    tensors: dict[str, Any] = dict(given)
    if library._should_convert_state_dict_to_diffusers(module.state_dict(), given):
        function: Any = library.SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        known = {"config": dict(original.config), "checkpoint": dict(given)}
        takes = inspect.signature(function).parameters
        try:
            with watch:
                tensors = function(**{name: one for name, one in known.items() if name in takes})
        except (KeyError, IndexError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"{original.name} does not hold {type(module).__name__} in a form that diffusers converts "
                f"({type(error).__name__}: {first_filled_line(str(error))})"
            ) from error
    held = module.state_dict()
    found = {name: tensor for name, tensor in tensors.items() if name in held}
    return Converted(found, keys, watch.calls, [kept, watch.kept, tensors])


def loadable(cls: type) -> str | None:
    """Return the name of the class under which diffusers converts single files of `cls`, None if it does not."""
    from diffusers.loaders.single_file_model import _get_single_file_loadable_mapping_class

    return _get_single_file_loadable_mapping_class(cls)


def holds(module: nn.Module, original: Original) -> bool:
    """Return whether the file contains every parameter of a module."""
    try:
        found = original.converted(module).tensors
    except InputError:
        return False
    return all(name in found for name, _ in module.named_parameters())


def load_original(
    module: nn.Module,
    original: Original,
    owned: Owned,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    reads: Reads | None = None,
) -> nn.Module:
    """Fill a module from a single file, as `load_module` does from a folder. Dtypes are those of from_single_file: with
    `dtype`, all floating tensors including buffers. Raises InputError for missing tensors and wrong shapes."""
    found = original.converted(module)
    known: dict[int, torch.Tensor] = {}

    def read(key: str, part: Slice | None = None) -> torch.Tensor:
        entry = original.entry(key)
        shape = entry.shape if part is None else part.shape(entry.shape)
        kind = original.dtype(key)
        memory = as_mapped(entry.start, int(torch.Size(shape).numel()) * kind.itemsize, kind).view(shape)
        read_slice(original.folder / original.files[key], entry, part, memory, reads)
        return memory

    for target in targets(module, original, {name: name for name in found.tensors}):
        held = owned(target.names[0])
        if not held:
            place(module, target, torch.empty_like(target.held, device="meta"))
            continue
        tensor = found.tensors[str(target.key)] if target.key else target.held
        if tuple(tensor.shape) != tuple(target.held.shape):
            raise InputError(
                f"{original.name}: {target.names[0]} has shape {list(tensor.shape)}, but {type(module).__name__} needs "
                f"{list(target.held.shape)}: the file and the configuration do not belong together"
            )
        part = held if isinstance(held, Slice) else None
        if id(tensor) in found.keys:
            value = read(found.keys[id(tensor)], part)
        else:
            value = found.value(tensor, read, known)
            value = value if part is None else part.take(value).clone()  # do not keep the whole tensor
        place(module, replace(target, part=part), value.to(device=device, dtype=target.held.dtype))
    finish(module, original, torch.device(device))
    return module.to(dtype) if dtype is not None else module


@dataclass
class OriginalText(Checkpoint):
    """A file with a text encoder in another format than transformers'."""

    model: Path = Path()
    """The folder of the pipeline, with the encoder's configuration."""
    component: str = ""

    def load(
        self, module: nn.Module, owned: Owned, *, dtype: torch.dtype | None, device: torch.device | str
    ) -> nn.Module:
        """Return the whole encoder as diffusers converts it if any part of it is owned (the caller cuts it), else
        `module` itself. Pages of the file that are not needed are not read."""
        from diffusers.loaders import single_file_utils as library
        from safetensors.torch import load_file

        if not any(owned(name) for name, _ in module.named_parameters()):
            return module
        file = self.folder / next(iter(self.files.values()))
        function: Any = library.create_diffusers_t5_model_from_checkpoint
        if type(module).__name__.startswith("CLIP"):
            function = library.create_diffusers_clip_model_from_ldm
        loaded = function(
            type(module),
            checkpoint=load_file(file),
            config=str(self.model),
            subfolder=self.component,
            torch_dtype=dtype,
            local_files_only=True,
        )
        return loaded.eval().to(device)


def text_encoder(cls: type, path: str, model: Path, component: str) -> OriginalText | None:
    """Return the text encoder of class `cls` in the file at `path`, None if the file has none."""
    from diffusers.loaders import single_file_utils as library

    plain = Original.at(path, {})
    keys = {key: plain.empty(key) for key in plain.files}
    there = library.is_clip_model_in_single_file(cls, keys)
    there = there or (cls.__name__ == "T5EncoderModel" and library.is_t5_in_single_file(keys))
    return OriginalText(plain.folder, plain.files, False, model=model, component=component) if there else None
