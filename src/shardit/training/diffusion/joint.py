"""`Joint`: a denoiser whose text encoders are trained, too, as one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardit.training.diffusion.families.prompts import embedded_with_gradients
from shardit.training.diffusion.families.table import TrainingFamily
from shardit.training.save import described_adapter


class Joint(nn.Module):
    """A denoiser that also has the text encoders of its pipeline; it is called as the denoiser.

    Only the blocks of the denoiser are shared out among stages. The encoders are small: each rank has them whole, and
    their gradients are summed like those of other parameters outside of blocks.
    """

    def __init__(self, family: TrainingFamily, pipe: Any, name: str, encoders: Sequence[str]):
        super().__init__()
        for one in (*encoders, name):
            setattr(self, one, getattr(pipe, one))
        self.__dict__.update(family=family, pipe=pipe, denoiser_name=name, encoder_names=tuple(encoders))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser."""
        return self._modules[self.denoiser_name](*args, **kwargs)  # pyright: ignore[reportOptionalCall]

    def __getattr__(self, name: str) -> Any:
        """Return what only the denoiser has: its configuration and the like, which pipelines read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_modules"][self.__dict__["denoiser_name"]], name)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the denoiser alone: blocks are looked for among the children."""
        yield self.denoiser_name, getattr(self, self.denoiser_name)

    def prompts(self, captions: Sequence[str], device: torch.device) -> Mapping[str, torch.Tensor]:
        """Return the embeddings of captions with gradients, as a batch."""
        return embedded_with_gradients(self.family, self.pipe, captions, device)

    def save_pretrained(self, folder: Path) -> None:
        """Write one LoRA file for `load_lora_weights`, with the adapters of all modules."""
        from peft.utils import get_peft_model_state_dict

        given: dict[str, Any] = {}
        for name in (self.denoiser_name, *self.encoder_names):
            module = getattr(self, name)
            given[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
            given[f"{name}_lora_adapter_metadata"] = described_adapter(module.peft_config["default"])
        type(self.pipe).save_lora_weights(folder, **given)
