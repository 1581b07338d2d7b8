"""Notices code that reads slices of weights as if they were whole: a loss that uses the weight of a head, say.

Units are compared with whole ones, and other modules with slices know that they have some; nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shardit.errors import UnsupportedError
from shardit.parallel.tensor.check.units import Checks

_PLAIN = ("grad", "is_leaf", "requires_grad", "shape")
"""Attributes that may be read anywhere, though their values may be tensors."""


class _Reads(TorchFunctionMode):
    """Sees the operations on parameters `named`, by id, outside of the modules in `inside`, by id."""

    def __init__(self, named: Mapping[int, str], inside: set[int], checks: Checks):
        super().__init__()
        self.named, self.inside, self.checks = named, inside, checks
        self.depth = 0

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.depth += id(module) in self.inside

    def leave(self, module: nn.Module, *_: Any) -> None:
        self.depth -= id(module) in self.inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth or self.checks.comparing or torch._C._current_autograd_node() is not None:  # pyright: ignore
            return out
        read = next((self.named[id(one)] for one in tree_leaves((args, kwargs)) if id(one) in self.named), None)
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if read is None or attribute in _PLAIN or not any(isinstance(one, torch.Tensor) for one in tree_leaves(out)):
            return out
        raise UnsupportedError(
            f"{read} is read outside of its module ({attribute or func.__name__}), but each tensor rank has a slice of "
            "it: call the module in its place, or use tensor_parallel_size=1"
        )


@contextmanager
def refused_reads(model: nn.Module, cut: Mapping[str, Any], checks: Checks) -> Iterator[None]:
    """Raise UnsupportedError meanwhile if code outside of modules with slices, and of units, reads a parameter among
    `cut`."""
    units = {id(module) for unit in checks.plan.units for module in checks.model.get_submodule(unit).modules()}
    named = {id(one): name for name, one in model.named_parameters(remove_duplicate=False) if name in cut}
    owners = {id(module) for module in model.modules() if any(id(one) in named for one in module._parameters.values())}
    reads = _Reads(named, units | owners, checks)
    with ExitStack() as stack:
        for hook in (
            register_module_forward_pre_hook(reads.enter),
            register_module_forward_hook(reads.leave, always_call=True),
        ):
            stack.callback(hook.remove)
        stack.enter_context(reads)
        yield
