"""Writes a recipe as a complete diffusers folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.models.tiny.progress_bar import no_progress_bar
from shardit.models.tiny.recipes.recipe import Part, Recipe
from shardit.models.tiny.weights import fill, read

if TYPE_CHECKING:
    import torch

SetWeights = Callable[[Any], None]
"""Sets all weights of a model."""


def write_folder(name: str, recipe: Recipe, folder: Path, dtype: torch.dtype) -> Path:
    """Writes into a temporary folder next to the target, then renames it: the target is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_parts(name, recipe, scratch, dtype)
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write_parts(name: str, recipe: Recipe, folder: Path, dtype: torch.dtype) -> None:
    import diffusers

    index: dict[str, Any] = {
        "_class_name": recipe.pipeline,
        "_diffusers_version": diffusers.__version__,
        "_name_or_path": f"tiny/{name}",
        **recipe.config,
    }
    for component, part in sorted(recipe.parts.items()):
        index[component] = [None, None] if part is None else [part.library, part.cls]
        if part is not None:
            (folder / component).mkdir()
            made_up = partial(fill, key=f"{name}/{component}")
            trained = None if recipe.weights is None else partial(read, file=recipe.weights, component=component)
            _BUILDERS[part.kind](part, folder / component, trained or made_up, dtype)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_model(part: Part, folder: Path, set_weights: SetWeights, dtype: torch.dtype) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        model = _diffusers_model(part) if part.library == "diffusers" else _transformers_model(part)
    set_weights(model)
    torch.nn.Module.to(model, dtype)  # diffusers' own `to` warns about modules that it would rather keep in float32
    if hasattr(model, "should_save_on_this_rank"):
        # transformers 5 writes on rank 0 alone; here any rank may be the one that writes the folder.
        model.should_save_on_this_rank = lambda is_main_process=True: True
    total = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    with no_progress_bar():
        model.eval().save_pretrained(str(folder), max_shard_size=total // part.shards + 1)


def _diffusers_model(part: Part) -> Any:
    import diffusers

    return getattr(diffusers, part.cls)(**part.config)


def _transformers_model(part: Part) -> Any:
    import transformers

    cls = getattr(transformers, part.cls)
    return cls(cls.config_class(**part.config))


def _save_tokenizer(part: Part, folder: Path, set_weights: SetWeights, dtype: torch.dtype) -> None:
    from shardit.models.tiny.tokens import save_tokenizer

    save_tokenizer(folder, **part.config)


def _save_processor(part: Part, folder: Path, set_weights: SetWeights, dtype: torch.dtype) -> None:
    """All files of a real processor folder; its class cannot be built without torchvision, so not by that class."""
    import transformers

    from shardit.models.tiny.recipes.text import QWEN_TOKENIZER
    from shardit.models.tiny.tokens import save_tokenizer

    save_tokenizer(folder, **QWEN_TOKENIZER.config)
    image_processor = transformers.Qwen2VLImageProcessorPil(**part.config)
    config = {**image_processor.to_dict(), "image_processor_type": "Qwen2VLImageProcessor"}
    config["processor_class"] = part.cls
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    video = {**part.config, "video_processor_type": "Qwen2VLVideoProcessor", "processor_class": part.cls}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")


def _save_scheduler(part: Part, folder: Path, set_weights: SetWeights, dtype: torch.dtype) -> None:
    import diffusers

    getattr(diffusers, part.cls)(**part.config).save_pretrained(str(folder))


_BUILDERS: dict[str, Callable[[Part, Path, SetWeights, Any], None]] = {
    "model": _save_model,
    "text": _save_model,
    "tokenizer": _save_tokenizer,
    "processor": _save_processor,
    "scheduler": _save_scheduler,
}
