"""Detects in-place writes by tensor version counters, or by values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from shardit.errors import RankError

Inputs = list[tuple[torch.Tensor, int]]
"""Tensors and their versions."""


def inputs_of(leaves: Iterable[Any]) -> Inputs:
    """Return the tensors among the arguments of a call in flight, with their versions, if torch counts them."""
    return [(leaf, version) for leaf in leaves if (version := version_of(leaf)) is not None]


def check_unchanged(inputs: Inputs, rank: int) -> None:
    """Raise RankError if a tensor was written to since: ranks may have used it before or after that."""
    if any(tensor._version != version for tensor, version in inputs):
        remedy = "use the result of the call before, or copy the argument"
        raise RankError(rank, f"an argument was changed in place while its call was in flight: {remedy}")


def writes(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many in-place writes to the tensors torch has counted, in all."""
    return sum(tensor._version for tensor in tensors if not tensor.is_inference())


def version_of(value: Any) -> int | None:
    """Return the version counter of a tensor; None if there is none."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def mark(tensor: torch.Tensor | None) -> Any:
    """Return a mark for `changed`: the tensor's version, or a copy if versions are not counted."""
    if tensor is None:
        return None
    return tensor.clone() if tensor.is_inference() else tensor._version


def changed(tensor: torch.Tensor, mark: Any) -> bool:
    """Return whether a tensor was written to since it was marked."""
    if isinstance(mark, torch.Tensor):
        return not torch.equal(value_bytes(tensor), value_bytes(mark))
    return tensor._version != mark


def value_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a strided tensor as flat bytes, over its own memory if that is dense."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # A dimension of one element may have any stride in a contiguous tensor, such as 0; a view as bytes needs 1.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
