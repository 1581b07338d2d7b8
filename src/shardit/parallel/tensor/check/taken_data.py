"""Slices whose `.data` code of users has taken: torch does not count what is written through it."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardit.core.modules.hooks import of_library
from shardit.core.runtime.digests import checksum

_data: Any = torch.Tensor.data
_TAKEN = "shardit_taken_data"


@dataclass
class TakenData:
    """The checksum of a slice before its `.data` was taken, and the tensors that were taken."""

    before: bytes
    by_user: list[weakref.ref[torch.Tensor]] = field(default_factory=list)


class SliceParameter(nn.Parameter):
    """A parameter of which this rank has a slice. If code of users takes or sets `.data`, its values are compared at
    the next call."""

    @property
    def data(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, without gradients and version counter."""
        taken = _data.__get__(self)
        if _is_of_user(sys._getframe(1).f_globals.get("__name__", "")):
            _taken_by_user(self).by_user.append(weakref.ref(taken))
        return taken

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if _is_of_user(sys._getframe(1).f_globals.get("__name__", "")):
            _taken_by_user(self)
        _data.__set__(self, value)

    def detach(self) -> torch.Tensor:
        """Return the values without gradients; for a new nn.Parameter of them as another SliceParameter, as torch
        expects."""
        plain = super().detach()
        makes_parameter = sys._getframe(1).f_globals.get("__name__") == nn.Parameter.__module__
        return plain.as_subclass(SliceParameter) if makes_parameter else plain


def _is_of_user(module: str) -> bool:
    return not of_library(module) and module.partition(".")[0] != "shardit"


def _taken_by_user(parameter: nn.Parameter) -> TakenData:
    own = vars(parameter)
    if _TAKEN not in own:
        own[_TAKEN] = TakenData(checksum(parameter))
    return own[_TAKEN]


def watch_data(parameter: nn.Parameter) -> None:
    """Notice from now on who takes the `.data` of a parameter, in place; its present values are right."""
    vars(parameter).pop(_TAKEN, None)
    if type(parameter) is nn.Parameter:
        parameter.__class__ = SliceParameter


def written_by_data(parameter: nn.Parameter) -> bool:
    """Return whether the values have changed since `.data` was first taken. It costs one read of the values if
    somebody has taken it, and nothing otherwise."""
    taken: TakenData | None = vars(parameter).get(_TAKEN)
    if taken is None:
        return False
    if checksum(parameter) != taken.before:
        return True
    if all(one() is None for one in taken.by_user):
        del vars(parameter)[_TAKEN]
    return False
