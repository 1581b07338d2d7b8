"""Forwards of modules with cut weights: subclasses in place that sum or gather over the ranks of the tensor axis."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from shardit.core.comm.collectives import Collectives
from shardit.core.modules.compiled import never_compiled
from shardit.core.modules.patching import Subclasses, share_subclass
from shardit.errors import UnsupportedError
from shardit.parallel.differentiable import joined, of_first, summed
from shardit.parallel.tensor.forward import unless_whole
from shardit.parallel.tensor.norms import across_gated, across_heads
from shardit.parallel.tensor.plan import PLAIN, Role


def install_role(module: nn.Module, role: Role, ranks: Collectives, made: Subclasses) -> None:
    """Give a module with a cut weight the forward of its role, in place."""
    forward = unless_whole(_FORWARDS[role.kind](role, ranks))
    if role.kind in ONE_OPERATION:
        forward = never_compiled(forward)
    share_subclass(module, made, (role,), lambda: {"forward": forward, PLAIN: type(module)})


ONE_OPERATION = {"rows", "channels", "gathered", "vocabulary"}
"""Kinds whose forward is one operation and a message. Code in torch.compile around them calls them as they are: it has
nothing to gain there, and would be compiled again for every shape."""


Finish = Callable[..., torch.Tensor]
"""The collective operation behind a linear: from this rank's part of its output to the whole. Further arguments are
parameters that only one rank uses for its part."""


def _sum(role: Role, ranks: Collectives) -> Finish:
    return lambda part, *learned: summed(ranks, part, *learned)


def _gather(role: Role, ranks: Collectives) -> Finish:
    lengths = role.shards.lengths
    return lambda part: joined(ranks, part, lengths, -1)


FINISH: dict[str, Callable[[Role, Collectives], Finish]] = {"rows": _sum, "gathered": _gather}
"""By the kind of a role."""

_unfinished: ContextVar[object] = ContextVar("shardit_unfinished", default=None)


@contextmanager
def unfinished(linear: nn.Module) -> Iterator[None]:
    """Temporarily make a linear return its part: the caller adds to it and finishes it."""
    token = _unfinished.set(linear)
    try:
        yield
    finally:
        _unfinished.reset(token)


def _rows(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Return the forward of a linear cut by its inputs: each rank's part of the product, then one sum."""
    finish = _sum(role, ranks)

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        # The bias is added to one summand, which needs no extra pass.
        part = F.linear(input, self.weight, self.bias if ranks.index == 0 else None)
        return part if _unfinished.get() is self else finish(part, self.bias)

    return forward


def _channels(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Return the forward of a convolution cut by its inputs."""

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        part = self._conv_forward(input, self.weight, self.bias if ranks.index == 0 else None)
        return summed(ranks, part, self.bias)

    return forward


def _gathered(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Return the forward of a linear cut by its outputs, for readers that need all of them."""
    finish = _gather(role, ranks)

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        part = F.linear(input, self.weight, self.bias)
        return part if _unfinished.get() is self else finish(part)

    return forward


def _vocabulary(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Return the forward of a table cut by rows: zeros for the rows of others, then one sum, which is exact."""
    total = role.shards.total
    ((start, length),) = role.shards.of(ranks.index).segments

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if self.max_norm is not None:
            raise UnsupportedError("max_norm of a table that is cut over tensor ranks: set it before parallelize")
        if input.device.type == "cpu" and input.numel() and not 0 <= int(input.min()) <= int(input.max()) < total:
            raise IndexError(f"a token id is not below {total}")  # like the whole table; without this, zero
        local = input - start
        others = (local < 0) | (local >= length)
        rows = F.embedding(local.masked_fill(others, 0), self.weight)
        return summed(ranks, rows.masked_fill(others.unsqueeze(-1), 0))

    return forward


def _parts(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Make the forward of a module with its own code, which returns a part of a sum."""
    finish = _sum(role, ranks)

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        once = {name: self._parameters[name] for name in role.once if ranks.index}
        self._parameters.update({name: torch.zeros_like(value) for name, value in once.items()})
        try:
            part = _plain_forward(self)(self, *args, **kwargs)
        finally:
            self._parameters.update(once)
        return finish(part, *once.values())

    return forward


def _of_heads(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Make the forward of attention with its own code, which gets the tables of its heads, and of which results that
    are heads are gathered."""
    ((start, length),) = role.shards.of(ranks.index).segments
    total, size, gather = role.shards.total, role.head, _gather(role, ranks)

    def own(table: Any) -> Any:
        if not isinstance(table, torch.Tensor):
            return table
        if table.shape[-1] == total != size:
            return table.narrow(-1, start, length)
        if table.ndim > 2 and table.shape[1] == total // size:
            return table.narrow(1, start // size, length // size)
        return table

    def whole(result: Any) -> Any:
        heads = isinstance(result, torch.Tensor) and result.shape[-1:] == (length,)
        return gather(result) if heads and length != total else result

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = _plain_forward(self)
        kwargs = {**kwargs, **dict(zip(_argument_names(plain), args, strict=False))}
        kwargs |= {name: tree_map(own, kwargs[name]) for name in role.tables if name in kwargs}
        out = plain(self, **kwargs)
        return tree_map(whole, out) if role.alone else out

    return forward


@functools.cache
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments behind the module itself."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _of_first(role: Role, ranks: Collectives) -> Callable[..., torch.Tensor]:
    """Make the forward of a whole module that returns the first rank's result: last bits may differ by machine."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return of_first(ranks, _plain_forward(self)(self, *args, **kwargs))

    return forward


def _plain_forward(module: nn.Module) -> Callable[..., torch.Tensor]:
    return next(vars(cls)[PLAIN] for cls in type(module).__mro__ if PLAIN in vars(cls)).forward


_FORWARDS = {
    "rows": _rows,
    "channels": _channels,
    "gathered": _gathered,
    "vocabulary": _vocabulary,
    "norm": across_heads,
    "gated_norm": across_gated,
    "sum": _parts,
    "first": _of_first,
    "heads": _of_heads,
}
