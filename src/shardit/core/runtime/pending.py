"""Pending tensors: results still on the wire. Metadata and views do not wait; the first real operation does."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from shardit.errors import UnsupportedError

_T: Any = torch.Tensor

METADATA = {
    _T.shape.__get__,
    _T.dtype.__get__,
    _T.device.__get__,
    _T.layout.__get__,
    _T.ndim.__get__,
    _T.is_cuda.__get__,
    _T.is_cpu.__get__,
    _T.is_meta.__get__,
    _T.is_sparse.__get__,
    _T.is_quantized.__get__,
    _T.is_nested.__get__,
    _T.is_mps.__get__,
    _T.is_xpu.__get__,
    _T.is_leaf.__get__,
    _T.requires_grad.__get__,
    _T.grad_fn.__get__,
    _T.itemsize.__get__,
    _T.nbytes.__get__,
    _T.size,
    _T.dim,
    _T.ndimension,
    _T.numel,
    _T.nelement,
    _T.stride,
    _T.storage_offset,
    _T.element_size,
    _T.is_contiguous,
    _T.is_floating_point,
    _T.is_complex,
    _T.is_inference,
    _T.get_device,
    _T.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""Queries of a tensor that do not read its data."""

SETTINGS = {_T.requires_grad.__set__, _T.requires_grad_}
"""Settings of a tensor that do not read its data."""

VIEWS = {
    _T.view,
    _T.reshape,
    _T.flatten,
    _T.unflatten,
    _T.chunk,
    _T.split,
    _T.unbind,
    _T.narrow,
    _T.select,
    _T.squeeze,
    _T.unsqueeze,
    _T.permute,
    _T.transpose,
    _T.expand,
    _T.detach,
    _T.__getitem__,
    _T.__iter__,
    torch.reshape,
    torch.flatten,
    torch.unflatten,
    torch.chunk,
    torch.split,
    torch.unbind,
    torch.narrow,
    torch.select,
    torch.squeeze,
    torch.unsqueeze,
    torch.permute,
    torch.transpose,
}
"""Operations that only view the same memory in another way; `reshape` and indexing do so in most cases."""


class PendingSource:
    """The source of pending tensors. `materialize` fills their memory; after it they are plain tensors."""

    def __init__(self, materialize: Callable[[], None]):
        self._materialize: Callable[[], None] | None = materialize
        self._tensors: list[weakref.ref[PendingTensor]] = []

    @property
    def ready(self) -> bool:
        """Return whether the data has arrived."""
        return self._materialize is None

    def wrap(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return a pending tensor over `buffer`, or `buffer` itself if the data has arrived."""
        if self.ready:
            return buffer
        tensor = buffer.as_subclass(PendingTensor)
        tensor._source = self
        self._tensors.append(weakref.ref(tensor))
        return tensor

    def wait(self) -> None:
        """Wait for the data, once; every tensor of this source then becomes a plain one."""
        if self._materialize is None:
            return
        self._materialize()  # may raise; then the source stays pending
        self._materialize = None
        for ref in self._tensors:
            tensor = ref()
            if tensor is not None:
                del tensor._source
                kind = Fetched if getattr(tensor, "_is_param", False) else torch.Tensor
                tensor.__class__ = kind  # pyright: ignore[reportAttributeAccessIssue]
        self._tensors.clear()


class PendingTensor(torch.Tensor):
    """A tensor whose memory is filled later. Not made directly: see `PendingSource.wrap`."""

    _source: PendingSource

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_new_parameter(func, args)
        if func in METADATA or func in SETTINGS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in VIEWS and not any(isinstance(leaf, PendingTensor) for leaf in tree_leaves((args[1:], kwargs))):
            out = _view(func, args, kwargs)
            if out is not None:
                return out
        # No guard is held here: waiting may switch to another coroutine.
        try:
            materialize((args, kwargs))
        except TypeError as error:  # which torch would take for one of the operator, and try the other operand
            raise RuntimeError(f"TypeError: {error}") from error
        return func(*args, **kwargs)


class Fetched(torch.Tensor):
    """A parameter of a component owned by one rank, with its data, as read by outside code."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _T.data.__set__:  # a new object each time
            raise UnsupportedError(
                "assigning to .data of a parameter that one rank owns has no effect: write into it (.data.copy_), or "
                "assign an nn.Parameter to the module"
            )
        refuse_new_parameter(func, args)
        materialize((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def is_read_parameter(value: Any) -> bool:
    """Return whether a value stands for a parameter of a component that one rank owns, as outside code has read it."""
    return isinstance(value, (PendingTensor, Fetched)) and getattr(value, "_is_param", False)


def refuse_new_parameter(func: Any, args: Any) -> None:
    """Raise UnsupportedError if torch makes a new nn.Parameter of such a parameter (weight norm, for example)."""
    if func is not _T.detach or not is_read_parameter(args[0]):
        return
    if sys._getframe(2).f_globals.get("__name__") == "torch.nn.parameter":
        raise UnsupportedError(
            "a parameter of a component that one rank owns cannot become another nn.Parameter: change the component "
            "before parallelize"
        )


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the view, pending like its base; None if the operation would have to read the data."""
    base = args[0]
    source = base._source
    if func is _T.__getitem__ and not _basic_index(args[1]):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        plain = base.as_subclass(torch.Tensor)
        if func in (_T.reshape, torch.reshape, _T.flatten, torch.flatten) and not plain.is_contiguous():
            return None
        out = list(plain.unbind(0)) if func is _T.__iter__ else func(plain, *args[1:], **kwargs)
    leaves, spec = tree_flatten(out)
    wrapped = tree_unflatten([source.wrap(t) if isinstance(t, torch.Tensor) else t for t in leaves], spec)
    return iter(wrapped) if func is _T.__iter__ else wrapped


def _basic_index(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, slice) or type(i) is int for i in items)


def materialize(tree: Any) -> None:
    """Wait for every pending tensor in nested containers; they become plain tensors in place."""
    materialize_leaves(tree_leaves(tree))


def materialize_leaves(leaves: Iterable[Any]) -> None:
    """Wait for the pending tensors among some values; they become plain tensors in place."""
    for leaf in leaves:
        if isinstance(leaf, PendingTensor):
            leaf._source.wait()
