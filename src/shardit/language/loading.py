"""Loading of a causal language model of which each rank reads only its own layers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.diffusion.loading.model_options import NO_OPTIONS, ModelOptions
from shardit.errors import InputError
from shardit.loading.checkpoint import Checkpoint
from shardit.loading.dtypes import Setting, dtype_of
from shardit.loading.index import INDEX
from shardit.loading.meta import build
from shardit.loading.safetensors_file import Reads
from shardit.loading.transformers_model import load_transformers
from shardit.loading.weights import Owned
from shardit.models.tiny.language import language_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG = "config.json"
"""The file that tells what a model of transformers is."""


def decoder_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder of a model of transformers, or of a tiny one; None for all else, such as a folder of diffusers."""
    if (tiny := language_folder(os.fspath(model))) is not None:
        return tiny
    folder = Path(model).expanduser()
    return folder if (folder / CONFIG).is_file() and not (folder / INDEX).is_file() else None


def check_decoder_options(folder: Path, given: Mapping[str, Any], options: ModelOptions) -> None:
    """Raise InputError for what a pipeline of diffusers takes and a language model does not."""
    own = {**given, **vars(options)}
    plain = {**dict.fromkeys(given), **vars(NO_OPTIONS)}
    wrong = next((name for name, value in own.items() if value != plain[name]), None)
    if wrong is not None:
        raise InputError(f"{wrong}: {folder} holds a language model, which takes none; leave it out")


def class_of(folder: Path) -> type:
    """The class for causal language models of a folder. Raises InputError where it has none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} is damaged: download or copy it again") from error
    named = next(iter(config.get("architectures") or []), None)
    name = named if named in NAMES.values() else NAMES.get(str(config.get("model_type")))
    if not isinstance(name, str):
        raise InputError(f"{folder} holds {named or 'no model'}: shardit runs causal language models of transformers")
    return getattr(transformers, name)


class PreparedDecoder:
    """A language model on meta, and the files of its weights."""

    def __init__(self, folder: Path, dtype: Setting = None):
        self.kept = dtype_of(dtype, "model")
        self.checkpoint = Checkpoint.open(folder)
        self.module: Any = build(class_of(folder), folder, self.kept, self.checkpoint.stored_dtype)

    def load(
        self,
        blocks: Sequence[str],
        owners: Sequence[int],
        stage: int,
        device: torch.device | str,
        reads: Reads | None = None,
    ) -> nn.Module:
        """The model with the weights that a stage needs: those of its blocks, and those outside of all blocks."""
        others = tuple(f"{name}." for name, owner in zip(blocks, owners, strict=True) if owner != stage)
        names: dict[int, list[str]] = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), []).append(name)
        # Tied weights have several names, and are needed where one of them is.
        needed = {name for tied in names.values() for name in tied if any(not one.startswith(others) for one in tied)}
        return self._load(needed.__contains__, device, reads)

    def load_whole(self, device: torch.device | str, reads: Reads | None = None) -> nn.Module:
        """The model with all of its weights."""
        return self._load(lambda _: True, device, reads)

    def _load(self, owned: Owned, device: torch.device | str, reads: Reads | None) -> nn.Module:
        return load_transformers(self.module, self.checkpoint, owned, dtype=self.kept, device=device, reads=reads)
