"""Chooses the way to shard the tokens of a transformer: declared, found by trial, or declared by diffusers.

1. `_sp_plan` on the model: declared by its author, so there is no search.
2. A plan found from its block calls (`found/model.py`). It supports uneven lengths, masks and sizes that coincide, and
is checked at each kind of block, so it comes before a plan that was written for another engine.
3. `_cp_plan`, diffusers' own, if nothing is found. To use it first: `model._sp_plan = model._cp_plan`.
4. Blocks on all tokens, their operations partitioned over the ranks (`partitioned/`), if that is not there or does not
work. A small list of blocks is partitioned before `_cp_plan` is asked.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from shardit.core.comm.mesh import Mesh
from shardit.core.modules.blocks import blocks_named
from shardit.core.modules.patching import subclass_in_place
from shardit.core.stages.transformer_stages import TransformerStages
from shardit.errors import InputError, UnsupportedError
from shardit.parallel.attention.sequence_attention import SequenceAttention
from shardit.parallel.sequence.declared.model import PlannedSequence, read_planned
from shardit.parallel.sequence.declared.rules import DECLARED, OF_DIFFUSERS
from shardit.parallel.sequence.found.model import SequenceParallel
from shardit.parallel.sequence.found.search import REMEDY, NoShardingFound

log = logging.getLogger(__name__)


@dataclass
class SequenceChoice:
    """The chosen way to shard the tokens of a transformer. other: makes the fallback if this one refuses a call."""

    way: SequenceParallel | PlannedSequence
    other: Callable[[], PlannedSequence] | None = None

    def forward(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the transformer."""
        try:
            return self.way.forward(call, args, kwargs)
        except NoShardingFound as not_found:
            # A forward inside pipeline stages cannot begin again.
            if self.other is None or self.way.stages is not None:
                raise
            return self._instead(not_found, call, args, kwargs)

    def _instead(
        self, not_found: NoShardingFound, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the call under the plan of diffusers; if that does not work either, partition the operations of
        blocks."""
        found, other = self.way, self.other
        assert other is not None
        assert isinstance(found, SequenceParallel)
        self.other = None
        try:
            self.way = other()
            self.way.install()
            out = self.way.forward(call, args, kwargs)
        except InputError:
            self.way, found.may_partition = found, True
            try:
                return found.forward(call, args, kwargs)
            except InputError as also:  # the first refusal is more informative
                raise not_found from also
        log.warning("%s is sharded as its %s says, since %s", type(found.model).__name__, OF_DIFFUSERS, not_found)
        return out


def shard_tokens(
    model: nn.Module,
    mesh: Mesh,
    cut: Callable[[], TransformerStages] | None = None,
    plan: Any = None,
    names: Collection[str] = (),
) -> SequenceParallel | PlannedSequence:
    """Shard the tokens of a transformer over the "sp" axis of the mesh, in place.

    cut: also cuts it into pipeline stages; it is called in the middle. The interceptor of the model's call must lie
    inside that of the stages, which may run a forward in pieces, and those of its modules outside theirs, so that
    stages see and send shards only. names: see `blocks_named`. Raises InputError if a declared plan does not fit the
    model, UnsupportedError if nothing is declared and the model has no block lists.
    """
    choice = _choose(model, SequenceAttention(mesh), plan, names)
    own_call = type(model).__call__

    @functools.wraps(own_call)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return choice.forward(own_call.__get__(self), args, kwargs)

    members: dict[str, Any] = {"__call__": __call__}
    members["shardit_sequence"] = property(lambda self: choice.way)
    subclass_in_place(model, members)
    choice.way.stages = cut() if cut is not None else None
    choice.way.install()
    return choice.way


def _choose(model: nn.Module, attention: SequenceAttention, plan: Any, names: Collection[str]) -> SequenceChoice:
    if getattr(model, DECLARED, None) is not None:
        return SequenceChoice(read_planned(model, DECLARED, attention))
    has_other = getattr(model, OF_DIFFUSERS, None) is not None
    blocks = blocks_named(model, names, plan)
    if blocks:
        other = (lambda: read_planned(model, OF_DIFFUSERS, attention)) if has_other else None
        return SequenceChoice(SequenceParallel(model, attention, blocks, may_partition=not has_other), other)
    if has_other:
        return SequenceChoice(read_planned(model, OF_DIFFUSERS, attention))
    raise UnsupportedError(f"{type(model).__name__} has no block lists, so its tokens cannot be sharded: {REMEDY}")
