"""LoRA adapters of language models: folders that peft or `shardit train` wrote; imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardit.errors import InputError, UnsupportedError
from shardit.language.loading.source import CONFIG, DecoderSource, read_config
from shardit.loading.hub import open_flat
from shardit.loading.index import ADAPTER_CONFIG
from shardit.loading.safetensors_file import Header
from shardit.settings.lora import Lora

WEIGHTS, TEMPLATE, TOKENIZER = "adapter_model.safetensors", "chat_template.jinja", "tokenizer_config.json"

_INDEPENDENT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "runtime_config", "megatron_config", "megatron_core"),
    *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "bias"),
    *("lora_dropout", "fan_in_fan_out", "corda_config", "eva_config", "loftq_config", "qalora_group_size"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
)
"""Fields of adapter_config.json of which the product of two matrices does not depend, or that are read here. Any other
field that is set means another kind of adapter (DoRA, say)."""

_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which the weights of the base model stay as they are. Others (PiSSA, say) change
them, and the adapter then belongs to the changed ones."""

_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<half>[AB])(?(kind)|\.weight)")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter of peft. path: as messages name it. file: its weights. pairs: the keys of matrices A and B of each
    module. replaced: the keys of whole tensors, by the parameter that they replace."""

    path: str
    file: Path
    scale: float
    config: dict[str, Any]
    header: Header
    pairs: dict[str, tuple[str, str]]
    replaced: dict[str, str]

    def factor(self, module: str) -> float:
        """Return the factor of the product B A of a module: scale, alpha and rank, as peft computes it."""
        rank, alpha = self.rank(module), self._chosen("alpha_pattern", "lora_alpha", module)
        return self.scale * alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def rank(self, module: str) -> int:
        """Return the rank that the configuration states for a module."""
        return self._chosen("rank_pattern", "r", module)

    def _chosen(self, patterns: str, default: str, module: str) -> Any:
        found = self.config.get(patterns) or {}
        return next((found[one] for one in found if re.match(rf"(.*\.)?({one})$", module)), self.config[default])

    @property
    def base(self) -> str:
        """Return the end of a message: the model on which the adapter was trained, if its files state one."""
        name = self.config.get("base_model_name_or_path")
        return f"; it was trained on {name}" if name else ""


def open_adapter(lora: Lora) -> Adapter:
    """Read the configuration of an adapter and the header of its weights. Files of a hub id are downloaded.

    Raises InputError for damaged files and for files of another form, UnsupportedError for adapters that are no plain
    products of two matrices.
    """
    if lora.arguments:
        name = next(iter(lora.arguments))
        raise InputError(f"lora {lora.path}: {name} is for pipelines of diffusers; leave it out")
    path = Path(lora.path)
    file = path if path.is_file() else _folder(lora.path) / WEIGHTS
    if not (file.parent / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"lora {lora.path} has no {ADAPTER_CONFIG}, which adapters of language models have: give the folder that "
            "peft or shardit train has written"
        )
    if not file.is_file():
        raise InputError(f"lora {lora.path} has no {WEIGHTS}: download or copy it again")
    config = read_config(file.parent, ADAPTER_CONFIG)
    _check_kind(lora.path, config)
    return _with_keys(lora, file, config, Header.read(file))


def check_base(adapter: Adapter, source: DecoderSource) -> None:
    """Raise InputError if the model on which an adapter was trained is on this disk, and of another family."""
    name = adapter.config.get("base_model_name_or_path")
    if not name or not (Path(name) / CONFIG).is_file() or source.model_type is None:
        return
    family = read_config(Path(name)).get("model_type")
    if family not in (None, source.model_type):
        raise InputError(
            f"lora {adapter.path} does not fit: it was trained on {name}, which is {family}, and the model is "
            f"{source.model_type}"
        )


def _folder(path: str) -> Path:
    """Return the folder of an adapter, which is downloaded for a hub id."""
    if Path(path).exists():
        return Path(path)
    remote = open_flat(path, ADAPTER_CONFIG)
    remote.fetch([WEIGHTS])
    return remote.folder


def _check_kind(path: str, config: dict[str, Any]) -> None:
    """Raise UnsupportedError for an adapter whose weights shardit cannot compute, InputError for a damaged one."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"lora {path} is a {config.get('peft_type')} adapter: only those of peft_type LORA run")
    other = next((name for name, value in config.items() if value and name not in _INDEPENDENT), None)
    if other is not None:
        raise UnsupportedError(
            f"lora {path} was trained with {other}={config[other]!s:.60}, which is not supported: merge it with "
            "merge_and_unload of peft and give the merged model"
        )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise UnsupportedError(
            f"lora {path} was trained with init_lora_weights={start}, which changes the weights of the base model: "
            "convert it with peft (path_initial_model_for_weight_conversion)"
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)):
            raise InputError(f"lora {path}: {ADAPTER_CONFIG} has no {name}: download or copy it again")


def _with_keys(lora: Lora, file: Path, config: dict[str, Any], header: Header) -> Adapter:
    halves: dict[str, dict[str, str]] = {}
    replaced = {}
    for key in header.entries:
        name = key.removeprefix(_PREFIX)
        if (found := _PAIR.fullmatch(name)) is not None:
            halves.setdefault(found["module"], {})[found["half"]] = key
        else:
            replaced[name.replace(".base_layer.", ".")] = key
    single = next((module for module, one in halves.items() if len(one) < 2), None)
    if single is not None or not header.entries:
        lack = "no tensor" if single is None else f"one matrix of two for {single}"
        raise InputError(f"lora {lora.path} has {lack}: download or copy it again")
    pairs = {module: (one["A"], one["B"]) for module, one in halves.items()}
    return Adapter(lora.path, file, lora.scale, config, header, pairs, replaced)


def adapted_tokenizer(source: DecoderSource, loras: Sequence[Lora]) -> Any:
    """Load the tokenizer of a model, with the chat template of the last adapter that has one."""
    tokenizer = source.tokenizer()
    use_chat_template(tokenizer, loras)
    return tokenizer


def use_chat_template(tokenizer: Any, loras: Sequence[Lora]) -> None:
    """Give a tokenizer the chat template of the last adapter that has one, since it was trained with that."""
    for lora in loras:
        folder = open_adapter(lora).file.parent
        if (folder / TEMPLATE).is_file():
            tokenizer.chat_template = (folder / TEMPLATE).read_text("utf-8")
        elif (folder / TOKENIZER).is_file():  # of an earlier version of transformers
            own = read_config(folder, TOKENIZER).get("chat_template")
            tokenizer.chat_template = own or tokenizer.chat_template
