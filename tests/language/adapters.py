"""Adapters of peft with random matrices, and the models that plain peft makes of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(folder: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    """Write the folder of an adapter of the model in `base` whose matrices are random. options: of `LoraConfig`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": ALL, **options})
        made = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        for name, value in made.named_parameters():
            if value.requires_grad:
                change = 0.3 * torch.randn(value.shape, generator=generator)
                value.data = change if "lora_" in name else value.data + change
        made.save_pretrained(str(folder))
    return folder


def plain_peft(base: Path, *adapters: tuple[Path, float], merged: bool = True, dtype: Any = None) -> Any:
    """Return the model of transformers with adapters of plain peft, merged or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        names = [f"adapter_{number}" for number in range(len(adapters))]
        for name, (folder, scale) in zip(names, adapters, strict=True):
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), name)
            parts: Any = [part for part in model.modules() if hasattr(part, "set_scale")]
            for part in parts:
                part.set_scale(name, scale)
        if names:
            base_model: Any = model.base_model
            base_model.set_adapter(names)
        made = model.merge_and_unload(adapter_names=names) if merged and names else model
        # peft freezes the weights, and torch computes products with frozen weights in another order.
        return made.eval().requires_grad_(True)


def change_config(folder: Path, **values: Any) -> Path:
    """Change values of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def change_weights(folder: Path, **changes: Any) -> Path:
    """Change tensors of an adapter by the end of their keys; None removes one."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for end, value in changes.items():
        key = next(one for one in tensors if one.endswith(end.replace("__", ".")))
        tensors.pop(key)
        if value is not None:
            tensors[key] = value
    save_file(tensors, file)
    return folder
