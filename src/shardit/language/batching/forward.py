"""Calls of a causal language model for the batches of the scheduler: one call of its own forward for each step."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache

from shardit.language.batching.cache_rows import can_join


class Forward:
    """A model, and its calls. Prepares arguments as `generate` of transformers does.

    has_cache: whether its state is a cache of transformers, created here. joins: whether rows of it can join and leave.
    only_states: whether it is one of states without keys.
    """

    def __init__(self, model: Any):
        self.model = model
        self._takes = set(inspect.signature(type(model).forward).parameters)
        self.has_cache = model._supports_default_dynamic_cache()
        cache = self.new_cache()
        self.joins = self.has_cache and can_join(cache)
        self.only_states = self.joins and all(cache.is_linear)

    def new_cache(self) -> Any:
        """Return an empty cache; None for a model that makes its own."""
        return DynamicCache(config=self.model.config.get_text_config(decoder=True)) if self.has_cache else None

    def __call__(
        self, ids: torch.Tensor, lengths: list[int], columns: int, state: dict[str, Any], is_first: bool
    ) -> torch.Tensor:
        """Compute the last columns of a batch and return the logits of the last one.

        ids: their tokens, (rows, new columns). lengths: real tokens of each row, with these. columns: of the batch,
        with these. state: arguments that a call hands to the next one, such as the cache; updated.
        """
        arguments = dict(state)
        if min(lengths) < columns and not self.only_states:
            arguments["attention_mask"] = _mask(lengths, columns)
        if "position_ids" in self._takes:
            arguments["position_ids"] = _positions(lengths, columns, ids.shape[1])
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        model, device = self.model, self.model.device
        arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        prepared = model.prepare_inputs_for_generation(
            ids.to(device), is_first_iteration=is_first, use_cache=True, **arguments
        )
        out = model(**prepared, return_dict=True)
        if not self.has_cache:
            kept = {"attention_mask", "position_ids", "logits_to_keep"}
            updated = model._update_model_kwargs_for_generation(out, dict(state))
            state.update({name: value for name, value in updated.items() if name not in kept})
        return out.logits


def _mask(lengths: list[int], columns: int) -> torch.Tensor:
    return (torch.arange(columns)[None] >= columns - torch.tensor(lengths)[:, None]).long()


def _positions(lengths: list[int], columns: int, new: int) -> torch.Tensor:
    first = torch.tensor(lengths)[:, None] - columns  # position of column 0, negative for padding
    return (first + torch.arange(columns - new, columns)[None]).clamp(min=0)
