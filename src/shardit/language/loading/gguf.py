"""GGUF files: transformers converts configuration and tensors; each rank reads only its own tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shardit.core.modules.blocks import find_blocks
from shardit.core.placement.slices import Owned, Slice
from shardit.errors import InputError, UnsupportedError, first_line
from shardit.language.loading.gguf_header import check_package, parsed_once
from shardit.loading.meta import build_transformers
from shardit.loading.safetensors_file import Reads
from shardit.loading.weights import Target, move_buffers, place, tied_names

_OF_LAYER = re.compile(r"blk\.(\d+)\.")


class GGUFFile:
    """A file of llama.cpp with the configuration, the tokenizer and the (mostly quantised) tensors of a model. Tensors
    are dequantised when they are read.

    Raises InputError if the package gguf is missing, or the file or its architecture cannot be read.
    """

    def __init__(self, path: Path):
        check_package(path)
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        self.path = path
        try:
            with parsed_once():
                self._parsed: dict[str, Any] = load_gguf_checkpoint(str(path))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise InputError(
                f"transformers cannot read {path} ({first_line(error)}): download or copy it again"
            ) from error

    def build(self, dtype: torch.dtype | None) -> nn.Module:
        """Build the model on meta; `dtype` None means float32."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with parsed_once():
            config: Any = AutoConfig.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        kinds: Any = AutoModelForCausalLM._model_mapping
        if type(config) not in kinds:
            raise UnsupportedError(f"{self.path} holds a {config.model_type}, which is no causal language model")
        return build_transformers(kinds[type(config)], config, dtype or torch.float32, str(self.path))

    def load(self, module: Any, owned: Owned, *, device: torch.device | str, reads: Reads | None) -> nn.Module:
        """Fill the parameters of `module` for which `owned(name)` is true or a slice; all others stay on meta. Raises
        InputError if the file lacks one of them."""
        held: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
        groups = tied_names(module)
        targets = {name: Target(tuple(names), None, held[name]) for names in groups for name in names}
        filled: set[str] = set()
        for name, values in self._tensors(module, owned, reads):
            target, part = targets.get(name), owned(name)
            if target is None or not part:
                continue
            if values.shape != target.held.shape:
                raise InputError(
                    f"{self.path}: {name} has shape {list(values.shape)}, but {type(module).__name__} needs "
                    f"{list(target.held.shape)}"
                )
            values = part.take(values) if isinstance(part, Slice) else values
            place(module, target, values.to(device=device, dtype=target.held.dtype))
            filled.update(target.names)
        if absent := [name for name, one in targets.items() if owned(name) and name not in filled and one.held.is_meta]:
            raise InputError(f"{self.path} has no tensor for {absent[0]} of {type(module).__name__}")
        move_buffers(module, torch.device(device))
        return module.eval()

    def _tensors(self, module: Any, owned: Owned, reads: Reads | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of owned layers, and owned tensors outside layers, with their names in the model."""
        import gguf
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        with parsed_once():
            reader = gguf.GGUFReader(str(self.path))
            architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
            processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self._parsed["config"])
            names = get_gguf_hf_weights_map(module, processor)
        layers = [
            any(owned(f"{name}.{one}") for one, _ in layer.named_parameters()) for name, layer in find_blocks(module)
        ]
        parsed: dict[str, Any] = {**self._parsed, "tensors": {}}  # processors collect merged experts in "tensors"
        for tensor in reader.tensors:
            layer, name = _OF_LAYER.match(tensor.name), names.get(tensor.name)
            if not (layers[int(layer[1])] if layer else name is not None and owned(name)):
                continue
            if reads is not None:
                reads.bytes += int(tensor.n_bytes)
            made = processor.process(
                weights=gguf.dequantize(tensor.data, tensor.tensor_type),
                name=tensor.name,
                tensor_key_mapping=names,
                parsed_parameters=parsed,
            )
            if made.name in names:
                yield names[made.name], torch.from_numpy(np.array(made.weights))
        yield from parsed["tensors"].items()
