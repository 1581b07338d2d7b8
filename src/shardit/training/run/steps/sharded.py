"""The state of the optimizer shared out over replicas: each updates a part of the parameters and sends it on.

An optimizer that treats each tensor alone updates it as if one replica had all, so the bits stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from shardit.core.comm.group import GroupCoordinator

BUCKET_BYTES = 1 << 26
"""Bytes of parameters that are sent in one message, about."""


def share_out(parameters: Mapping[str, nn.Parameter], replicas: int) -> dict[str, int]:
    """Return the replica that updates each parameter: the largest first, each to the replica with the least."""
    held = [0] * replicas
    owners: dict[str, int] = {}
    for name in sorted(parameters, key=lambda name: (-parameters[name].numel(), name)):
        owners[name] = held.index(min(held))
        held[owners[name]] += parameters[name].numel()
    return owners


@torch.no_grad()
def broadcast_owned(parameters: Mapping[str, nn.Parameter], owners: Mapping[str, int], group: GroupCoordinator) -> None:
    """Send each parameter from its replica to the others. Collective over the replicas."""
    for (owner, _), names in _buckets(parameters, owners):
        some = [parameters[name] for name in names]
        flat = group.broadcast(torch.cat([one.detach().reshape(-1) for one in some]), owner)
        if group.rank_in_group != owner:
            for one, part in zip(some, flat.split([one.numel() for one in some]), strict=True):
                one.copy_(part.view_as(one))


def _buckets(
    parameters: Mapping[str, nn.Parameter], owners: Mapping[str, int]
) -> list[tuple[tuple[int, torch.dtype], list[str]]]:
    """Divide parameters into runs of one owner and one type, of about BUCKET_BYTES, the same on all replicas."""
    found: list[tuple[tuple[int, torch.dtype], list[str]]] = []
    size = 0
    for name in sorted(parameters, key=lambda name: (owners[name], str(parameters[name].dtype), name)):
        one = parameters[name]
        if not found or found[-1][0] != (owners[name], one.dtype) or size >= BUCKET_BYTES:
            found.append(((owners[name], one.dtype), []))
            size = 0
        found[-1][1].append(name)
        size += one.nbytes
    return found
