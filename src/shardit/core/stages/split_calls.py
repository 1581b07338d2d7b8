"""Batched calls that run in parts, by sample, so that stages and guidance ranks have something to overlap."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.core.runtime import microbatch
from shardit.core.runtime.flat_call import FlatCall, describe_leaf
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.randomness import generators_kept, moved, states
from shardit.core.stages.entry import Forward
from shardit.core.stages.first_call import FirstCalls
from shardit.core.stages.runtime import Runtime
from shardit.errors import RankError, UnsupportedError

log = logging.getLogger(__name__)


@dataclass
class SplitCalls:
    """The batched calls of one transformer. whole: makes a call in one piece. _known: whether calls of a kind give the
    same in parts; learned in the first one with samples that differ, on all ranks alike."""

    name: str
    runtime: Runtime
    first: FirstCalls
    whole: Callable[[Forward, FlatCall, Any], Any]
    _known: dict[Any, bool] = field(default_factory=dict)

    def run(self, forward: Forward, call: FlatCall, code: Any, parts: int) -> Any:
        """Make a batched call, in as many parts if they give what the whole batch gives."""
        # Samples may be related by their number (one of two branches of guidance has more than one frame in it), or if
        # a flag among the arguments says so.
        samples = microbatch.batch_size(call.args, call.kwargs)
        flags = tuple(describe_leaf(leaf) for leaf in call.leaves if not isinstance(leaf, torch.Tensor))
        key = call.mode_key(code), flags, microbatch.pattern(call.args, call.kwargs), samples, parts
        if key in self._known and not self._known[key]:
            return self.whole(forward, call, code)

        def in_parts() -> Any:
            return microbatch.merge([self.whole(forward, piece, code) for piece in microbatch.split(call, parts)])

        if key in self._known:
            return in_parts()
        if not any(self.runtime.replica.group.gather_objects(microbatch.samples_differ(call.args, call.kwargs))):
            return self.whole(forward, call, code)
        device = self.runtime.mesh.device
        before = states(device, [])
        whole = self.whole(forward, call.again(), code)
        materialize(whole)
        merged, error = None, None
        try:
            if self.first.alone:
                raise UnsupportedError("it changes its modules for the length of a call")
            if moved(before, states(device, [])):
                raise UnsupportedError("it draws random numbers")
            with generators_kept(device):
                merged = in_parts()
                materialize(merged)
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # a model that takes no such batch: it is kept whole
            error = failure
        close = error is None and microbatch.close(whole, merged)
        self._known[key] = all(self.runtime.replica.group.gather_objects(close))
        if not self._known[key] and self.runtime.mesh.rank == 0:
            why = error or "it differs"
            log.warning("%s: a batch cannot be split by sample (%s); it stays whole", self.name, why)
        # What is split later is split now, too: the same request gives the same bits however often it is run.
        return merged if self._known[key] else whole

    def forget(self) -> None:
        """Learn all kinds again: the model has been changed."""
        self._known.clear()
