"""Random generators that all ranks advance alike: the states after draws of one rank are sent to the others."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

States = dict[str, Any]
"""States of generators as picklable data, by what they are: "torch", "device", "python", "numpy", or "given 0", ..."""


GENERATORS = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)
Generator = torch.Generator | numpy.random.Generator | numpy.random.RandomState | random.Random

_NAMES = frozenset((cls.__module__, cls.__name__) for cls in GENERATORS)
_of_generators: dict[type, bool] = {}


def is_generator(value: Any) -> TypeGuard[Generator]:
    """Return whether a value is a random generator. By names: torch.compile fails at the class `random.Random` in
    code."""
    kind = type(value)
    if kind not in _of_generators:
        _of_generators[kind] = any((cls.__module__, cls.__name__) in _NAMES for cls in kind.__mro__)
    return _of_generators[kind]


DEPTH = 3
"""Depth of the search for generators in objects of other kinds."""


def generators_in(arguments: Any, depth: int = DEPTH) -> list[Generator]:
    """Return the generators among the arguments of a call, and in objects among them, in order."""
    found: list[Generator] = []
    for leaf in tree_leaves(arguments):
        if is_generator(leaf):
            found.append(leaf)
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (torch.Tensor, nn.Module, type)):
            found += [] if callable(leaf) else generators_in(list(vars(leaf).values()), depth - 1)
    return found


def state_in(generator: Generator) -> Any:
    """Return the state of a generator, as picklable data."""
    if isinstance(generator, numpy.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def set_state(generator: Generator, state: Any) -> None:
    """Set a state that `state_in` gave."""
    if isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = pickle.loads(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def states(device: torch.device, given: Sequence[Generator]) -> States:
    """Return the states of the global generators (torch's on the CPU and on `device`, Python's, numpy's) and of the
    given."""
    found: States = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy.random.get_state()}
    if device.type == "cuda" and torch.cuda.is_initialized():
        found["device"] = torch.cuda.get_rng_state(device)
    return found | {f"given {number}": state_in(generator) for number, generator in enumerate(given)}


def torch_states(device: torch.device, given: Sequence[Generator] = ()) -> list[Any]:
    """Return the states of torch's global generators alone, in some microseconds, and of the given."""
    found: list[Any] = [torch.get_rng_state()]
    if device.type == "cuda" and torch.cuda.is_initialized():
        found.append(torch.cuda.get_rng_state(device))
    return found + list(map(state_in, given))


def set_torch_states(found: Sequence[torch.Tensor], device: torch.device) -> None:
    """Set the states of torch's global generators that `torch_states` gave."""
    torch.set_rng_state(found[0])
    if len(found) > 1:
        torch.cuda.set_rng_state(found[1], device)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def any_moved(before: list[Any], after: list[Any]) -> bool:
    """Return whether one of the generators has been drawn from."""
    return not all(map(_same, before, after))


def moved(before: States, after: States) -> States:
    """Return those of the states that have changed."""
    return {name: state for name, state in after.items() if name not in before or not _same(before[name], state)}


def set_states(news: Mapping[str, Any], device: torch.device, given: Sequence[Generator]) -> None:
    """Set some of the generators in `states`."""
    for name, state in news.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "device":
            torch.cuda.set_rng_state(state, device)
        elif name == "python":
            random.setstate(state)
        elif name == "numpy":
            numpy.random.set_state(state)
        else:
            set_state(given[int(name.split()[1])], state)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Leave the global generators as they are before, whatever draws meanwhile."""
    before = states(device, [])
    try:
        yield
    finally:
        set_states({name: before[name] for name in moved(before, states(device, []))}, device, [])


class DrawsWithoutData(TorchDispatchMode):
    """Draws into tensors without data advance the global generator as on a rank that has the data: libraries
    initialise a new module at random before they fill it."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _INITIALISERS and args[0].is_meta:
            func(torch.empty_like(args[0], device=self._device), *args[1:], **(kwargs or {}))
        return out


_INITIALISERS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):  # of bytes, which torch.equal compares one by one
        return one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, tuple) and len(one) > 4 and isinstance(one[1], numpy.ndarray):
        # numpy's: a name, 624 numbers, how many are used, what is left of a pair
        return one[2:] == other[2:] and numpy.array_equal(one[1], other[1])
    return one == other


def dropout_in_training(model: nn.Module) -> str | None:
    """Return the name of a module of `model` that would drop values at random now, if there is one.

    Code that calls the function `dropout` itself keeps its probability in an attribute with such a name.
    """
    for name, module in model.named_modules():
        if module.training and any(probability > 0 for probability in _probabilities(module)):
            return name or type(model).__name__
    return None


def _probabilities(module: nn.Module) -> Iterator[float]:
    if isinstance(module, _DropoutNd):
        yield module.p
    for name, value in vars(module).items():
        if "drop" in name and type(value) is float:
            yield value
