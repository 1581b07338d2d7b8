"""Intercepts attention: every attention call of a running block goes to its handler.

Most models end in `torch.nn.functional.scaled_dot_product_attention`, which is replaced while a block runs (a function
mode would cost several microseconds at each operation). Other attention functions that a library keeps in a registry
are wrapped there by the code that knows the library. Both do nothing unless a block of a sharded model is running in
the same context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import BuiltinFunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from shardit.core.modules.compiled import define_operation, never_compiled
from shardit.errors import UnsupportedError
from shardit.parallel.attention.sequence_attention import Call

_plain_sdpa = F.scaled_dot_product_attention
_users = 0
"""Number of open `intercept_attention` contexts: forwards in flight enter and leave it in any order."""


class Handler(Protocol):
    """Shards the attention calls of a block."""

    def attend(self, call: Call) -> torch.Tensor:
        """Return the attention output, [batch, tokens, heads, width]."""
        ...


_handler: ContextVar[Handler | None] = ContextVar("shardit_attention", default=None)


@contextmanager
def intercept_attention(handler: Handler) -> Iterator[None]:
    """Send attention calls in this context to `handler`."""
    global _plain_sdpa, _users
    if F.scaled_dot_product_attention is not _sdpa:
        _plain_sdpa = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = _sdpa
    token = _handler.set(handler)
    _users += 1
    try:
        yield
    finally:
        _handler.reset(token)
        _users -= 1
        if not _users:
            F.scaled_dot_product_attention = _plain_sdpa


def attention_is_intercepted() -> bool:
    """Return whether attention calls in this context go to a handler."""
    return _handler.get() is not None


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    given = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    if torch.compiler.is_compiling() and OPAQUE and query.ndim == 4 and not torch.is_grad_enabled():
        return torch.ops.shardit.attention(*given)
    return _intercepted(*given)


@never_compiled
def _intercepted(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    def inner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = _plain_sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)

    handler = _handler.get()
    if handler is None:
        return _plain_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if query.ndim != 4:
        raise UnsupportedError(
            f"attention over tensors of {query.ndim} dimensions (batch, heads, tokens, width needed)"
        )
    not_ring = "dropout" if dropout_p else _replaced()
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return _hand_over(handler, Call(q, k, v, attn_mask, inner, scale, not_ring, is_causal)).transpose(1, 2)


def _in_graph(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    """Return attention in the memory layout that `_described` says."""
    return _intercepted(query, key, value, *others).transpose(1, 2).contiguous().transpose(1, 2)


def _described(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> torch.Tensor:
    """Return an empty result of attention, [batch, heads, queries, width], its tokens outside of its heads in memory:
    kernels return that, and so does Ulysses."""
    batch, heads, queries, _ = query.shape
    return query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)


ATTENTION = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa) -> Tensor"
)
OPAQUE = define_operation(ATTENTION, _in_graph, _described)
"""Whether compiled code contains attention as one operation, in place of a break in its graph."""


def _replaced() -> str | None:
    if isinstance(_plain_sdpa, BuiltinFunctionType):
        return None
    return f"{getattr(_plain_sdpa, '__qualname__', 'a function')} in place of F.scaled_dot_product_attention"


@never_compiled
def _hand_over(handler: Handler, call: Call) -> torch.Tensor:
    token = _handler.set(None)  # attention inside the handler is not a call of the block
    try:
        return handler.attend(call)
    finally:
        _handler.reset(token)


def wrapped_back_end(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an attention function that does not end in torch's own, called by keyword with [batch, tokens, heads,
    width], for its registry."""

    @functools.wraps(function)
    def backend(**kwargs: Any) -> torch.Tensor:
        handler = _handler.get()
        if handler is None:
            return function(**kwargs)
        q, k, v = (kwargs.pop(key) for key in ("query", "key", "value"))
        mask = kwargs.pop("attn_mask", None)
        flat = isinstance(mask, torch.Tensor) and mask.shape == (q.shape[0], k.shape[1])
        if flat:  # over keys, for each sample
            mask = mask[:, None, None]

        def inner(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            if mask is None:
                return function(query=q, key=k, value=v, **kwargs)
            return function(query=q, key=k, value=v, attn_mask=mask[:, 0, 0] if flat else mask, **kwargs)

        not_ring = f"the attention back end {name!r}"
        return _hand_over(handler, Call(q, k, v, mask, inner, kwargs.get("scale"), not_ring))

    return backend
