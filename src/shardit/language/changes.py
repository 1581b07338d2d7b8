"""Changes that users make to a sharded language model, found before a call of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.decoder.decoder_stages import DecoderStages
from shardit.core.runtime.randomness import dropout_in_training
from shardit.errors import UnsupportedError
from shardit.parallel.tensor.adapters import cut_adapters
from shardit.parallel.tensor.plan import TensorPlan


class Changes:
    """Checks a model for changes since it was sharded.

    _linears: the modules at the names of cut linears, with those that hold them.
    """

    def __init__(self, model: Any, stages: DecoderStages | None, slices: TensorPlan | None, ranks: Collectives | None):
        self._model, self._stages, self._slices, self._ranks = model, stages, slices, ranks
        self._linears: list[tuple[nn.Module, str, nn.Module | None]] = []
        self._note_linears()

    def check(self) -> None:
        """Cut adapters that were loaded since the last call. Raises UnsupportedError for changes that would make other
        results on several ranks."""
        if self._stages is not None:
            self._refuse_dropout(self._stages)
        if any(parent._modules.get(leaf) is not module for parent, leaf, module in self._linears):
            assert self._slices is not None
            assert self._ranks is not None
            cut_adapters(self._model, self._slices, self._ranks)
            self._note_linears()

    def _note_linears(self) -> None:
        names = dict.fromkeys(name.rpartition(".")[0] for name in (self._slices.cuts if self._slices else ()))
        parts = [name.rpartition(".") for name in names if name]
        holders = [(self._model.get_submodule(parent), leaf) for parent, _, leaf in parts]
        self._linears = [(parent, leaf, parent._modules.get(leaf)) for parent, leaf in holders]

    def _refuse_dropout(self, stages: DecoderStages) -> None:
        if not self._model.training and not any(block.training for _, block in stages.blocks):
            return
        if (part := dropout_in_training(self._model)) is not None:
            raise UnsupportedError(
                f"{type(self._model).__name__} is in training mode, and {part} would drop other values than on one "
                "rank: call .eval() on it"
            )
