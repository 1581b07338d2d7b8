"""Outputs that transformers collects inside of layers: attention weights, logits of routers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.output_capturing import _active_collector

from shardit.core.comm.collectives import Collectives
from shardit.errors import UnsupportedError

ATTENTIONS = "attentions"


class CollectedOutputs:
    """The outputs that the hooks of transformers collect in a call of a model, see `core.decoder.stages.Collector`.

    heads: the number of query heads of the model. ranks: the tensor ranks, which have slices of the heads.
    """

    def __init__(self, heads: int, ranks: Collectives | None):
        self._heads, self._ranks = heads, ranks

    def names(self) -> tuple[str, ...]:
        """Return the names of the outputs that may be collected inside of layers."""
        found = _active_collector.get()
        if not found:
            return ()
        return tuple(name for name, held in found.items() if isinstance(held, list))

    def apart(self, call: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, list[Any]]]]:
        """Return a function that calls a layer and returns its result and the outputs collected in it."""

        @functools.wraps(call)
        def apart(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, list[Any]]]:
            collected: Any = _active_collector.get()
            held = {name: collected[name] for name in self.names()}
            collected.update({name: list(outputs) for name, outputs in held.items()})  # hooks count those before
            try:
                out = call(*args, **kwargs)
                new = {name: collected[name][len(outputs) :] for name, outputs in held.items()}
                return out, {name: [self._whole(name, output) for output in outputs] for name, outputs in new.items()}
            finally:
                collected.update(held)

        return apart

    def add(self, found: dict[str, list[Any]]) -> None:
        """Add the outputs collected in a layer to those of the model."""
        collected: Any = _active_collector.get()
        for name, outputs in found.items():
            collected[name].extend(outputs)

    def of_all_heads(self, out: Any) -> Any:
        """Complete the attention weights in the output of a model, in place, and return it."""
        weights = out.get(ATTENTIONS) if isinstance(out, dict) else None
        if weights and self._ranks is not None:
            out[ATTENTIONS] = tuple(self._whole(ATTENTIONS, one) for one in weights)
        return out

    def _whole(self, name: str, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            return output
        if name == ATTENTIONS and self._ranks is not None and output.ndim > 1 and output.shape[1] != self._heads:
            output = self._gathered(output, self._ranks)
        return output.contiguous()

    def _gathered(self, weights: torch.Tensor, ranks: Collectives) -> torch.Tensor:
        """Return attention weights of all heads. Raises UnsupportedError if the ranks do not have these."""
        counts = [int.from_bytes(one, "big") for one in ranks.group.gather_bytes(weights.shape[1].to_bytes(4, "big"))]
        if type(weights) is not torch.Tensor or sum(counts) != self._heads:
            raise UnsupportedError(
                f"output_attentions: the tensor ranks have {counts} of {self._heads} heads, which cannot be put "
                "together; use tensor_parallel_size=1"
            )
        return ranks.all_gather(weights, counts, 1)
