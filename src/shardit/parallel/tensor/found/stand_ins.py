"""A copy of a module in which linears give fixed random outputs and record their inputs: what is left is the code
between them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardit.core.placement.slices import Segments
from shardit.parallel.tensor.heads import has_hooks, is_linear

LARGEST = 1 << 22
"""Most elements of a tensor that a trial gives values to; larger ones belong to no code between linears."""


KIND: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of all values of a trial, whatever the model has."""


class NoTrialError(Exception):
    """The module cannot be tried apart from its model."""


def is_convolution(module: Any) -> bool:
    """Return whether a module is a plain convolution of all channels that keeps the size of an image."""
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not has_hooks(module)
    return plain and module.groups == 1 and set(module.stride) == {1} and module.padding != "valid"


def is_depthwise(module: Any) -> bool:
    """Return whether a module is a plain convolution of each channel apart."""
    plain = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and not has_hooks(module)
    return plain and module.groups == module.in_channels == module.out_channels > 1


def mixes_channels(module: Any) -> bool:
    """Return whether each output channel of a module has a part of each input channel."""
    return is_linear(module) or is_convolution(module)


def is_like_linear(module: Any) -> bool:
    """Return whether a module is a linear, or a convolution of all channels at one place."""
    return is_linear(module) or (is_convolution(module) and set(module.kernel_size) == {1})


class StandIn(nn.Module):
    """Gives a fixed random output in place of a linear, or a part of it, and records the input.

    width: number of all output channels; size: number of input channels; dim: where the channels are. share: segments
    of the output that it gives (None: all). moved: segments that have other values than before.
    """

    def __init__(self, linear: Any, seed: int) -> None:
        super().__init__()
        self.dim = -1 if is_linear(linear) else 1
        self.size = linear.in_features if is_linear(linear) else linear.in_channels
        self.width = linear.out_features if is_linear(linear) else linear.out_channels
        self.seed = seed
        self.share: Segments | None = None
        self.moved: tuple[int, int] | None = None
        self.seen: list[torch.Tensor] = []
        if is_linear(linear):
            self.in_features, self.out_features = self.size, self.width
        self.weight, self.bias = torch.zeros(1, **KIND), None  # code may ask for its dtype
        self.strides = [1] * (0 if is_linear(linear) else len(linear.kernel_size))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(input, torch.Tensor) or (self.dim == 1 and input.ndim != len(self.strides) + 2):
            raise TypeError("its linears get something else")
        if input.numel() > LARGEST:
            raise NoTrialError("it makes much of a small input")
        self.seen.append(input.detach().clone())
        shape = list(input.shape)
        shape[self.dim] = self.width
        generator = torch.Generator().manual_seed(self.seed * 1000 + len(self.seen))
        out = torch.randn(shape, generator=generator, **KIND)
        if self.moved is not None:
            part = out.narrow(self.dim, *self.moved)
            part.add_(torch.rand(part.shape, generator=generator, **KIND) + 0.5)
        if self.share is not None:
            out = torch.cat([out.narrow(self.dim, *segment) for segment in self.share], self.dim)
        return out


class UnitStandIn(nn.Module):
    """Gives fixed random outputs in place of a part that is cut already: one of the shape of its first input, or a pair
    with one of the shape of the second input or nothing."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        generator = torch.Generator().manual_seed(2)
        made = [torch.randn(value.shape, generator=generator, **KIND) for value in given[:2]]
        return (*made, None)[:2] if self.pair else made[0]


class Trial:
    """A copy of a module with stand-ins for its linears, which can be called.

    units: names of parts that are cut already; pairs: they give two results. linears: stand-ins by name. channels:
    convolutions of each channel apart, by name.
    """

    def __init__(self, module: nn.Module, units: Sequence[str] = (), pairs: bool = False) -> None:
        memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in module.parameters()}
        memo |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
        self.module = copy.deepcopy(module, memo).eval()
        for name in units:
            self.module.set_submodule(name, UnitStandIn(pairs))
        names = [name for name, part in self.module.named_modules() if mixes_channels(part)]
        self.linears = {}
        for seed, name in enumerate(names, 1):
            self.linears[name] = StandIn(self.module.get_submodule(name), seed)
            self.module.set_submodule(name, self.linears[name])
        self.channels = {name: part for name, part in self.module.named_modules() if is_depthwise(part)}
        generator = torch.Generator().manual_seed(0)
        for part in self.module.modules():
            for name, held in part._parameters.items():
                if held is not None:
                    if held.ndim > 1 and part not in self.channels.values():
                        raise NoTrialError("it has weights that are no linears")
                    part._parameters[name] = nn.Parameter(_values(held, generator), False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = _values(buffer, generator)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the copy, with the same random draws each time."""
        for linear in self.linears.values():
            linear.seen.clear()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.module(*args, **kwargs)


def _values(held: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return values for a small tensor of a module: its own may not be loaded yet."""
    if held.numel() > LARGEST:
        raise NoTrialError("it has large tensors that are no linears")
    if not held.is_floating_point():
        return torch.zeros(held.shape, dtype=held.dtype, device="cpu")
    return torch.randn(held.shape, generator=generator, **KIND)
