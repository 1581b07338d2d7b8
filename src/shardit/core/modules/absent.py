"""Parameters whose data another rank has: on meta, but user code that asks for their device gets that of this rank."""

from __future__ import annotations

import sys

import torch
from torch import nn

_device = torch.Tensor.device.__get__  # pyright: ignore[reportAttributeAccessIssue]


class AbsentParameter(nn.Parameter):
    """A parameter on meta. `x.to(next(model.parameters()).device)` in user code, run on all ranks alike, then keeps the
    data of x on every rank."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The device of this rank; meta for libraries that place tensors."""
        caller = f"{sys._getframe(1).f_globals.get('__name__', '')}."
        here, placing = vars(self).get("shardit_here", (None, ()))
        return _device(self) if here is None or caller.startswith(placing) else here


def mark_absent(module: nn.Module, device: torch.device, placing: tuple[str, ...]) -> None:
    """Make the parameters of a module that are on meta AbsentParameters, in place. placing: prefixes of the modules of
    libraries that place tensors next to parameters, and so see meta."""
    for parameter in module.parameters():
        if parameter.is_meta and type(parameter) is nn.Parameter:
            parameter.__class__ = AbsentParameter
            vars(parameter)["shardit_here"] = device, placing
