"""Calls of a causal language model for the batches of the scheduler: one call of its own forward for each step."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import DynamicCache

from shardit.language.batching.cache_rows import can_join

WINDOW_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")
"""Functions of transformers for the masks of sliding windows."""


class Forward:
    """A model, and its calls. Prepares arguments as `generate` of transformers does.

    has_cache: whether its state is a cache of transformers, created here. joins: whether rows can join and leave it.
    only_states: whether it is one of states without keys. masks_windows: whether its code masks what a sliding window
    hides, in prompts that continue, too.
    """

    def __init__(self, model: Any):
        self.model = model
        self._takes = set(inspect.signature(type(model).forward).parameters)
        self.has_cache = model._supports_default_dynamic_cache()
        cache = self.new_cache()
        self.joins = self.has_cache and can_join(cache) and not _follows_length(model)
        self.only_states = self.joins and all(cache.is_linear)
        code, slides = vars(sys.modules[type(model).__module__]), self.joins and any(cache.is_sliding)
        self.masks_windows = not slides or any(name in code for name in WINDOW_MASKS)

    def new_cache(self) -> Any:
        """Return an empty cache; None for a model that makes its own."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True)) if self.has_cache else None

    def __call__(
        self, ids: torch.Tensor, lengths: list[int], columns: int, state: dict[str, Any], is_first: bool, keep: int = 1
    ) -> torch.Tensor:
        """Compute the last columns of a batch and return the logits of the last one.

        ids: their tokens, (rows, new columns). lengths: real tokens of each row, with these. columns: of the batch,
        with these. state: arguments that a call hands to the next one, such as the cache; updated. keep: 0 for the
        logits of all columns; some models always return these.
        """
        arguments = dict(state)
        if min(lengths) < columns and not self.only_states:
            arguments["attention_mask"] = _mask(lengths, columns)
        if "position_ids" in self._takes:
            arguments["position_ids"] = _positions(lengths, columns, ids.shape[1])
        model, device = self.model, self.model.device
        arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        prepared = model.prepare_inputs_for_generation(
            ids.to(device), is_first_iteration=is_first, use_cache=True, **arguments
        )
        self._keep(prepared, keep)
        return model(**prepared, return_dict=True).logits

    def unpadded(self, ids: torch.Tensor, state: dict[str, Any], is_first: bool, keep: int = 1) -> torch.Tensor:
        """Compute a prompt, or the next token, of rows of one length as `generate` does, for any model. ids: all tokens
        of the rows. state, keep: as for a call. Return the logits of the last position."""
        model, device = self.model, self.model.device
        if is_first:
            state.update({"use_cache": True, "attention_mask": torch.ones_like(ids, device=device)})
            if "position_ids" in self._takes:
                state["position_ids"] = torch.arange(ids.shape[1], device=device).repeat(len(ids), 1)
        prepared = model.prepare_inputs_for_generation(
            ids.to(device), next_sequence_length=None if is_first else 1, is_first_iteration=is_first, **state
        )
        self._keep(prepared, keep)
        out = model(**prepared, return_dict=True)
        state.update(model._update_model_kwargs_for_generation(out, dict(state)))
        return out.logits

    def _keep(self, prepared: dict[str, Any], keep: int) -> None:
        """Set the number of logits last: some families (Falcon-H1, Zamba 2) set that of their configuration."""
        if "logits_to_keep" in self._takes:
            prepared["logits_to_keep"] = keep


def _follows_length(model: Any) -> bool:
    """Return whether the rotary frequencies of a call follow its largest position (longrope, dynamic): rows of a batch
    would change each other's texts, and chunks of a prompt its own."""
    kinds = [module.rope_type for module in model.modules() if hasattr(module, "rope_type")]
    names = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any("longrope" in str(name) or "dynamic" in str(name) for name in names)


def _mask(lengths: list[int], columns: int) -> torch.Tensor:
    return (torch.arange(columns)[None] >= columns - torch.tensor(lengths)[:, None]).long()


def _positions(lengths: list[int], columns: int, new: int) -> torch.Tensor:
    first = torch.tensor(lengths)[:, None] - columns  # position of column 0, negative for padding
    return (first + torch.arange(columns - new, columns)[None]).clamp(min=0)
