"""Finds the tensors that cross each cut of a watched loss.

A storage crosses a cut if it derives from a block, was written before the cut and is read after it. Storages, not
tensors, are followed, so that views and writes in place need no rules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardit.core.plans.call_plan import Address
from shardit.core.plans.trace import Event, Trace
from shardit.core.training.loss_plan import CutTensor, Layout
from shardit.errors import UnsupportedError


@dataclass
class Liveness:
    """The storages that are live across each cut.

    layouts: at handles. learns: whether each call site has a block with trainable parameters. written_in: segment
    of the last write to a storage. created: storages that code outside blocks or a block created with data of a block.
    early: storages that a receiver needs before the cut, since its code makes others of them again. rewrites: segments
    of later writes, and whether a block made them. grads: storages that may require a gradient.
    """

    trace: Trace
    segments: list[tuple[int, int]]
    layouts: dict[Address, Layout]
    learns: list[bool]
    grads: set[int]
    written_in: dict[int, int] = field(default_factory=dict)
    created: set[int] = field(default_factory=set)
    rewrites: dict[int, list[tuple[int, bool]]] = field(default_factory=dict)
    live: list[dict[int, None]] = field(default_factory=list)
    early: set[int] = field(default_factory=set)
    _ingredients: dict[int, dict[int, int]] = field(default_factory=dict)

    def cuts(self, loss: int) -> tuple[tuple[CutTensor, ...], ...]:
        """Return what crosses each cut. loss: the storage of the loss. Raises UnsupportedError for what cannot."""
        self.live = [{} for _ in self.segments[1:]]
        written_in = [k for k, (first, last) in enumerate(self.segments) for _ in range(first, last + 1)]
        end = Event(len(written_in), (loss,), (), True)
        seen: set[int] = set(self.trace.inputs)
        for event in [*self.trace.events, end]:
            outside = event.after == 0 and not event.block
            self._follow(event, -1 if outside else written_in[min(event.after, len(written_in) - 1)], seen)
            seen.update(event.reads, event.writes)
        found: list[dict[int, list[CutTensor]]] = []
        wanted = -1
        while wanted != (wanted := len(self.early) + sum(map(len, self.live))):  # what is made again adds ingredients
            found = [{s: self._items(s, k) for s in sorted(of)} for k, of in enumerate([dict(of) for of in self.live])]
        for k, items in enumerate(found):
            wrong = [
                s for s, of in items.items() if s in self.early and (s in self.rewrites or any(i.late for i in of))
            ]
            if wrong:
                raise self._refusal(wrong[0], k)
        return tuple(tuple(item for storage in sorted(of) for item in of[storage]) for of in found)

    def _follow(self, event: Event, segment: int, seen: set[int]) -> None:
        """Take one event in: what it reads is live from its last write on."""
        for storage in event.reads:
            if storage in self.written_in:
                self._keep(storage, self.written_in[storage], segment)
        if self.grads.intersection(event.reads) or (event.block and self.learns[event.after]):
            self.grads.update(event.writes)
        for storage in event.writes if event.derived else ():
            if storage in seen:
                self.rewrites.setdefault(storage, []).append((segment, event.block))
            else:
                self.created.add(storage)
                self._ingredients[storage] = {
                    one: self.written_in[one] for one in event.reads if one in self.written_in
                }
            self.written_in[storage] = segment

    def _keep(self, storage: int, start: int, end: int) -> None:
        for k in range(start, end):
            self.live[k][storage] = None

    def _items(self, storage: int, k: int) -> list[CutTensor]:
        """Return how a storage crosses cut `k`: by its handles, or not at all if the receiver makes it again."""
        last, rewrites = self.segments[k][1], self.rewrites.get(storage, [])
        rewritten = any(segment > k for segment, _ in rewrites)
        site = self.trace.created.get(storage)
        handles = [one for one in self.trace.handles.get(storage, ()) if one.site <= last]
        if site is not None:
            views = {self.layouts[one]: one for one in reversed(handles) if one.kind == "out" and one.site == site}
            if len(views) > 1 and rewrites:
                raise self._refusal(storage, k)
            late = any(segment <= k and not block for segment, block in rewrites)
            return [self._item(one, storage, late, rewritten) for one in sorted(views.values(), key=_place)]
        again = not rewrites and storage in self.created
        whole = [one for one in handles if self.layouts[one].is_whole]
        if whole and not (again and storage in self.early):
            return [self._item(whole[0], storage, True, rewritten)]
        if not again:
            raise self._refusal(storage, k)
        for one, start in self._ingredients[storage].items():
            self.early.add(one)
            self._keep(one, start, k + 1)
        return []

    def _item(self, address: Address, storage: int, late: bool, rewritten: bool) -> CutTensor:
        layout = self.layouts[address]
        differentiable = storage in self.grads and (layout.dtype.is_floating_point or layout.dtype.is_complex)
        return CutTensor(address, layout, late, rewritten, differentiable)

    def _refusal(self, storage: int, k: int) -> UnsupportedError:
        site = self.trace.created.get(storage)
        what = self.trace.makers.get(storage, f"an output of block call {site}")
        return UnsupportedError(
            f"a tensor ({what}) is used after block call {self.segments[k][1]}, where the stages are cut, and can be "
            "neither carried nor made again there: cut elsewhere with layer_partition, or use pipeline_parallel_size=1"
        )


def _place(address: Address) -> tuple[int, int]:
    return address.site, address.leaf
