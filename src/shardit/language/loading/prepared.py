"""Loading of a causal language model: each rank reads only its own layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.errors import InputError
from shardit.language.loading.adapter import open_adapter
from shardit.language.loading.gguf import GGUFFile
from shardit.language.loading.merge import check_adapters, merge_adapters, shapes_of
from shardit.language.loading.source import DecoderSource, read_config
from shardit.language.loading.untied import untie
from shardit.language.sharding import DecoderLayout, blocks_of
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.dtypes import Setting, dtype_of
from shardit.loading.index import ADAPTER_CONFIG
from shardit.loading.meta import build
from shardit.loading.safetensors_file import Reads
from shardit.loading.transformers_model import load_transformers
from shardit.loading.weights import Owned, names_of_stage
from shardit.parallel.tensor.apply import owned_slices
from shardit.settings.lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import nn


def class_of(source: DecoderSource, generates: bool = True) -> type:
    """Return the class of a source: a causal language model, a model of text and images, or, unless it has to generate
    tokens, one with the same layers and another head or none.

    Raises InputError if it has none.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named, kind = source.architecture, str(source.model_type)
    causal, images = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = named in (*causal.values(), *images.values())
    if not known and named is not None and hasattr(transformers, named):
        _check_other(source, named, generates)
        return getattr(transformers, named)
    name = named if known else causal.get(kind, images.get(kind))
    if not isinstance(name, str):
        raise InputError(
            f"{source.folder} holds {named or 'no model'}: shardit runs causal language models of transformers"
        )
    return getattr(transformers, name)


def _check_other(source: DecoderSource, named: str, generates: bool) -> None:
    """Raise InputError for a class that is no language model, if one is needed, and for encoder and decoder."""
    if read_config(source.folder).get("is_encoder_decoder"):
        raise InputError(
            f"{source.folder} holds {named}, an encoder and a decoder, which only parallelize takes: load it with "
            "transformers, and give it to shardit.parallelize(model, tensor_parallel_size=...)"
        )
    if generates:
        raise InputError(
            f"{source.folder} holds {named}, which generates no text: load it with shardit.load, and call it"
        )


def _refuse_second_adapter(folder: Path, loras: Sequence[Lora]) -> None:
    """Raise InputError for an adapter in the folder of a model, unless it is one of those that are merged: transformers
    would load it."""
    given = [Path(lora.path).resolve() for lora in loras]
    if not any(folder.resolve() in (path, path.parent) for path in given):
        raise InputError(
            f"{folder} holds an adapter besides the model: give it as lora={folder} (--lora), or remove "
            f"{ADAPTER_CONFIG} to run the model without it"
        )


class PreparedDecoder:
    """A language model on meta, with the files of its weights, and the adapters that loading merges into them. Raises
    InputError for adapters that do not fit. generates: whether the model has to generate tokens. weights: whether it
    needs its weights."""

    def __init__(
        self,
        source: DecoderSource,
        dtype: Setting = None,
        loras: Sequence[Lora] = (),
        generates: bool = True,
        weights: bool = True,
    ):
        self.source, self.kept = source, dtype_of(dtype, "model")
        if source.gguf is None and (source.folder / ADAPTER_CONFIG).is_file():
            _refuse_second_adapter(source.folder, loras)
        self._file: GGUFFile | None = None
        self._checkpoint: Checkpoint | None = None
        if source.gguf is not None:
            self._file = GGUFFile(source.folder / source.gguf)
            self.module: Any = self._file.build(self.kept)
        elif not weights:
            self.module = build(class_of(source, generates), source.folder, self.kept)
        else:
            self._checkpoint = Checkpoint.open(source.folder, source.remote)
            self.module = build(class_of(source, generates), source.folder, self.kept, self._checkpoint.stored_dtype)
            untie(self.module, self._checkpoint)
        self._adapters = [open_adapter(lora) for lora in loras]
        check_adapters(self.module, self._adapters)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model. Raises InputError if transformers cannot read it."""
        return self.source.tokenizer()

    def owned(self, layout: DecoderLayout, coords: Mapping[str, int]) -> Owned:
        """Return the weights that the rank at `coords` of the mesh needs: its slices of the weights of its stage's
        blocks, and of those outside all blocks."""
        blocks = [name for name, _ in blocks_of(self.module)]
        needed = names_of_stage(self.module, blocks, layout.owners, coords["pp"])
        return owned_slices(needed.__contains__, layout.slices, coords["tp"])

    def load(
        self,
        layout: DecoderLayout,
        coords: Mapping[str, int],
        device: torch.device | str,
        reads: Reads | None = None,
    ) -> nn.Module:
        """Load the weights that the rank at `coords` of the mesh needs, and return the model."""
        return self.load_owned(self.owned(layout, coords), device, reads)

    def load_whole(self, device: torch.device | str, reads: Reads | None = None) -> nn.Module:
        """Load all weights, and return the model."""
        return self.load_owned(lambda _: True, device, reads)

    def load_owned(self, owned: Owned, device: torch.device | str, reads: Reads | None = None) -> nn.Module:
        """Load the weights for which `owned(name)` is true or a slice, and return the model."""
        shapes = shapes_of(self.module)
        if self._file is not None:
            model = self._file.load(self.module, owned, device=device, reads=reads)
        else:
            assert self._checkpoint is not None
            model = load_transformers(self.module, self._checkpoint, owned, dtype=self.kept, device=device, reads=reads)
        merge_adapters(model, self._adapters, owned, shapes)
        return model
