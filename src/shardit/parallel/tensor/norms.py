"""RMSNorm over cut channels: the ranks sum the squares of their parts.

Queries and keys of an attention are both normed before either is used, so both sums are sent in one message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.modules.patching import Subclasses, share_subclass
from shardit.parallel.differentiable import summed
from shardit.parallel.tensor.forward import unless_whole
from shardit.parallel.tensor.plan import PLAIN, Role


def across_heads(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Return the forward of a single norm."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return _scaled(self, hidden_states, summed(ranks, _squares(hidden_states)), role.shards.total)

    return forward


def across_gated(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Make the forward of a norm over all channels after their product with gates, as state-space models have it."""

    def forward(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        full = hidden_states.float() if gate is None else hidden_states.float() * F.silu(gate.float())
        mean = summed(ranks, _squares(full)) / role.shards.total
        return self.weight * (full * torch.rsqrt(mean + _eps(self))).to(hidden_states.dtype)

    return forward


@dataclass
class _SentAhead:
    """The keys, for the query norm, and then their summed squares, for the key norm.

    Calls in flight share it: between two messages each call sets both again, and checks whether the keys are its own.
    """

    keys: torch.Tensor | None = None
    squares: torch.Tensor | None = None


def install_pair(
    query_norm: nn.Module,
    key_linear: nn.Module,
    key_norm: nn.Module,
    roles: tuple[Role, Role],
    ranks: Collectives,
    made: Subclasses,
) -> None:
    """Make two norms with these `roles` send their sums together, in place.

    The keys are the latest output of `key_linear`. If `key_norm` then gets other keys (another processor, fused
    projections), it sends its own sums: all ranks run the same program, so all decide alike.
    """
    query_total, key_total = (role.shards.total for role in roles)
    plain_linear, plain_norm = type(key_linear).forward, type(key_norm).forward

    def linear(self: Any, input: torch.Tensor) -> torch.Tensor:
        keys = plain_linear(self, input)
        self.shardit_ahead.keys, self.shardit_ahead.squares = keys, None
        return keys

    def first(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        squares, ahead = _squares(hidden_states), self.shardit_ahead
        keys = ahead.keys
        if keys is None:
            return _scaled(self, hidden_states, summed(ranks, squares), query_total)
        own = _squares(keys)
        both = summed(ranks, torch.cat([squares.flatten(), own.flatten()]))
        ahead.keys, ahead.squares = keys, both[squares.numel() :].view_as(own)
        squares = both[: squares.numel()].view_as(squares)
        return _scaled(self, hidden_states, squares, query_total)

    def second(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        ahead = self.shardit_ahead
        squares = ahead.squares if hidden_states is ahead.keys else None
        ahead.keys = ahead.squares = None
        if squares is None:
            return plain_norm(self, hidden_states)
        return _scaled(self, hidden_states, squares, key_total)

    ahead = _SentAhead()
    for module, forward in ((key_linear, linear), (query_norm, first), (key_norm, second)):
        module.shardit_ahead = ahead  # pyright: ignore[reportArgumentType]
        members = {"forward": unless_whole(forward), PLAIN: type(module)}
        share_subclass(module, made, (forward.__name__, roles), lambda: members)  # noqa: B023


def _squares(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states.float().square().sum(-1, keepdim=True)


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", None) if not hasattr(norm, "eps") else norm.eps


def _scaled(norm: Any, hidden_states: torch.Tensor, squares: torch.Tensor, total: int) -> torch.Tensor:
    """Scale in float32 and weight in the dtype of the weight, as torch.nn.RMSNorm and that of diffusers do."""
    eps = _eps(norm)
    scaled = hidden_states.float() * torch.rsqrt(
        squares / total + (torch.finfo(hidden_states.dtype).eps if eps is None else eps)
    )
    half = norm.weight.dtype in (torch.float16, torch.bfloat16)
    return (scaled.to(norm.weight.dtype) if half else scaled) * norm.weight
