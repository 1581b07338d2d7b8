"""Sums of gradients over ranks; over replicas they begin while the last backward of a step still runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardit.core.comm.group import GroupCoordinator

BUCKET_BYTES = 1 << 24
"""Bytes of gradients that are summed in one message, about."""


@dataclass
class _Bucket:
    """Parameters of one type whose gradients travel together.

    used: a rank had a gradient of it in the step before. missing: number of its parameters whose gradient is not
    complete. changed: a gradient changed after the sum began. sent: the sum, once it has begun, and its message.
    """

    parameters: list[nn.Parameter]
    used: bool = False
    missing: int = 0
    changed: bool = False
    sent: tuple[torch.Tensor, Any] | None = None


def sum_gradients(parameters: Sequence[nn.Parameter], group: GroupCoordinator) -> None:
    """Sum the gradients of parameters over a group, in place. Ranks that have a parameter on meta take part with zeros.
    A parameter without a gradient on any rank gets none."""
    GradientSums(parameters, group, early=False).finish()


class GradientSums:
    """The sums of one list of parameters, which is the same on every rank of a group.

    early: they begin during the backward. A gradient is taken for complete once it was added to as often as in the
    step before with as many micro-batches. That need not hold: what changes later is summed a second time. Sums begin
    in a fixed order, last parameters first, as ranks have to do alike.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: GroupCoordinator, *, early: bool):
        self.parameters, self.group = list(parameters), group
        self.begun_early = 0
        self._buckets = [_Bucket(part) for part in _divided(self.parameters[::-1])]
        self._of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}
        self._known: dict[int, Counter[nn.Parameter]] = {}
        self._expected: Counter[nn.Parameter] | None = None
        self._added: Counter[nn.Parameter] = Counter()
        self._micro_batches = 0
        hooked = self.parameters if early else []
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._add) for parameter in hooked]

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, micro_batches: int) -> None:
        """Begin a step with so many micro-batches on this replica."""
        self._micro_batches, self._expected = micro_batches, self._known.get(micro_batches)
        self._added, self.begun_early = Counter(), 0
        for bucket in self._buckets:
            bucket.sent, bucket.changed = None, False
            bucket.missing = sum(bool(self._expected[one]) for one in bucket.parameters) if self._expected else -1

    def finish(self) -> None:
        """Put the sums into the gradients. A parameter without a gradient on any rank gets none."""
        if self.group.world_size == 1 or not self.parameters:
            return
        self.begun_early = sum(bucket.sent is not None for bucket in self._buckets)
        self._send(bucket for bucket in self._buckets if bucket.used and bucket.sent is None)
        has = [one.grad is not None for one in self.parameters] + [bucket.changed for bucket in self._buckets]
        counts = self.group.all_reduce(torch.tensor(has).to(self.group.device, torch.int32)).tolist()
        found = {one: count > 0 for one, count in zip(self.parameters, counts, strict=False)}
        changed = counts[len(self.parameters) :]
        for bucket, again in zip(self._buckets, changed, strict=True):
            bucket.used = any(found[one] for one in bucket.parameters)
            if again and bucket.sent is not None:
                self.group.wait([bucket.sent[1]], "all_reduce")
                bucket.sent = None
        self._send(bucket for bucket in self._buckets if bucket.used and bucket.sent is None)
        for bucket in self._buckets:
            if bucket.sent is not None:
                self._store_sum(bucket, found)
        self._known[self._micro_batches] = self._added

    def _add(self, parameter: nn.Parameter) -> None:
        """Note that a gradient was added to; begin the sums of complete buckets."""
        self._added[parameter] += 1
        bucket = self._of[parameter]
        bucket.changed |= bucket.sent is not None
        if self._expected is None or self._added[parameter] != self._expected[parameter]:
            return
        bucket.missing -= 1
        for one in self._buckets:
            if one.used and one.sent is None:
                if one.missing != 0:
                    break
                self._send([one])

    def _send(self, buckets: Iterable[_Bucket]) -> None:
        for bucket in buckets:
            first = bucket.parameters[0]
            flat = torch.zeros(sum(_sizes(bucket)), dtype=first.dtype, device=self.group.device)
            for parameter, part in zip(bucket.parameters, flat.split(_sizes(bucket)), strict=True):
                if parameter.grad is not None:
                    part.copy_(parameter.grad.reshape(-1))
            bucket.sent = flat, self.group.start_all_reduce(flat)

    def _store_sum(self, bucket: _Bucket, found: dict[nn.Parameter, bool]) -> None:
        assert bucket.sent is not None
        flat, work = bucket.sent
        self.group.wait([work], "all_reduce")
        for parameter, part in zip(bucket.parameters, flat.split(_sizes(bucket)), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view(parameter.shape))
            elif found[parameter] and not parameter.is_meta:
                parameter.grad = part.view(parameter.shape).clone()
        bucket.sent = None


def _sizes(bucket: _Bucket) -> list[int]:
    return [parameter.numel() for parameter in bucket.parameters]


def _divided(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Divide parameters into runs of one type and about BUCKET_BYTES."""
    found: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not found or size >= BUCKET_BYTES or found[-1][0].dtype != parameter.dtype:
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return found
