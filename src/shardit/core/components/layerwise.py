"""An encoder split into units over ranks: all ranks run the same forward, and each unit runs on its owner.

Calls of an encoder are rare, each has a new length, and the result is needed immediately. So no communication is
planned: the output of a unit is pending on all ranks, and is broadcast when the program first uses it (see `owned`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardit.core.comm.barrier import checked_barrier
from shardit.core.comm.p2p import Comm
from shardit.core.components.boundary import Boundary, Turn, unbound
from shardit.core.components.kv_stand_ins import changed_layers, find_caches, replace_layers, state_of
from shardit.core.components.owned import LazyBroadcast, call_on, lazy_tensor, move_to_meta, unwrapped
from shardit.core.modules.hooks import hooks_below
from shardit.core.modules.patching import subclass_in_place
from shardit.core.runtime.flat_call import FlatCall
from shardit.core.runtime.pending import PendingTensor
from shardit.core.runtime.randomness import generators_in
from shardit.core.runtime.versions import changed, mark
from shardit.errors import RankError, UnsupportedError


@dataclass
class LayerwiseEncoder:
    """One encoder split into units.

    owners[i]: the rank of `comm` that runs unit i. ran[i]: number of times this rank ran it (0 if another rank owns
    it).
    """

    model: nn.Module
    comm: Comm
    units: list[tuple[str, nn.Module]]
    owners: list[int]
    ran: Counter[int] = field(default_factory=Counter)
    _checking: bool = False
    _known: set[Any] = field(default_factory=set)

    def call(
        self, path: str, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a call from outside, of the encoder or of a part. The first call of a kind checks that all ranks take the
        same path through it. Calls of parts inside a unit run on its owner."""
        unit = self.unit_of(f"{path}.")
        if unit is not None and (path != self.units[unit][0] or name not in ("__call__", "forward")):
            return self.unit_call(unit, function, args, kwargs)
        if kwargs.get("output_attentions") and gives_attentions(self.model):
            raise UnsupportedError(f"output_attentions: the layers of {self._name} lie on several ranks")
        for unit_name, module in self.units:
            if hooked := hooks_below(module):
                raise UnsupportedError(
                    f"{unit_name}.{hooked[0]} of {self._name} has a hook, and runs on one rank: put it on {unit_name}"
                )
        kind = (path, name, FlatCall.of(args, kwargs).mode_key(self.model.training))
        self._checking = kind not in self._known
        try:
            out = function(*args, **kwargs)
            self._barrier("the end")
        except RankError:
            raise
        except Exception as error:
            self._barrier(error)
            raise
        finally:
            self._checking = False
        self._known.add(kind)
        return out

    def unit_of(self, name: str) -> int | None:
        """Return the number of the unit that contains a module or a tensor, given its name; None if no unit does."""
        return next((i for i, (unit, _) in enumerate(self.units) if name.startswith(f"{unit}.")), None)

    def unit_call(self, index: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Intercept the call of a unit: its owner runs it, all ranks get the outputs with pending tensors."""
        self._barrier(self.units[index][0])
        owner, arguments, caches = self.owners[index], list(_tensors((args, kwargs))), find_caches(args, kwargs)
        for tensor in arguments:
            if isinstance(tensor, PendingTensor):
                self._provide(tensor._source, owner)

        def run() -> tuple[Any, list[int], list[Any]]:
            with unwrapped(arguments):
                before, states = [mark(t) for t in arguments], [state_of(cache) for cache in caches]
                out = call(*args, **kwargs)
                if [id(t) for t in _tensors((args, kwargs))] != [id(t) for t in arguments]:
                    raise UnsupportedError(f"{self.units[index][0]} changes a list or dict among its arguments")
                written = [q for q, t in enumerate(arguments) if changed(t, before[q])]
            self.ran[index] += 1
            return out, written, [changed_layers(state, cache) for state, cache in zip(states, caches, strict=True)]

        out, written, layers = call_on(self.comm, owner, run, arguments, generators_in((args, kwargs)))
        for q in written:
            LazyBroadcast.written(self.comm, owner, arguments[q])
        if owner != self.comm.rank:
            for cache, new in zip(caches, layers, strict=True):
                replace_layers(cache, new)
        return out

    def read(self, name: str, tensor: torch.Tensor, cut: Collection[str]) -> torch.Tensor:
        """Return a parameter or a buffer for code outside. Tensors outside all units are on every rank."""
        unit = self.unit_of(name)
        if unit is None:
            return tensor
        return lazy_tensor(self.comm, self.owners[unit], type(self.model), name, tensor, cut)

    def _provide(self, source: Any, owner: int) -> None:
        """Send the data of a pending argument to the owner of the next unit."""
        if isinstance(source, LazyBroadcast) and source.comm is self.comm:
            source.provide(owner)
        else:
            source.wait()

    def _barrier(self, what: str | Exception) -> None:
        """In the first call of a kind, wait until all ranks reach the same point, or raise on all of them."""
        if not self._checking:
            return
        differ = checked_barrier(self.comm, what)
        if differ is not None:
            self._checking = False
            raise UnsupportedError(f"{self._name} cannot be cut at its layers: outside of them {differ}")

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def gives_attentions(model: nn.Module) -> bool:
    """Return whether a model can return attention maps on request: of the named implementations only "eager" does."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    return not names or "eager" in names


def cut_layerwise(
    model: nn.Module,
    comm: Comm,
    units: Sequence[str],
    owners: Sequence[int],
    cut: Collection[str] = (),
    shared: Collection[int] = (),
    turn: Turn = unbound,
) -> LayerwiseEncoder:
    """Shard an encoder in place: keep the units of this rank, and intercept the calls of all units. `cut`: parameters
    of which owners hold slices; code outside that reads one gets an UnsupportedError. `shared`: ids of the tensors that
    another component also has; every rank keeps them. `turn`: see Boundary.

    The interceptor replaces `forward`, not `__call__` as for the blocks of a transformer: transformers collects hidden
    states with hooks on the layers, which must also see the outputs of layers of other ranks.
    """
    made = LayerwiseEncoder(model, comm, [(name, model.get_submodule(name)) for name in units], list(owners))
    absent = [unit for unit, owner in zip(made.units, made.owners, strict=True) if owner != comm.rank]
    named = [one for name, unit in absent for one in unit.named_parameters(name, remove_duplicate=False)]
    move_to_meta(model, named, shared)
    for index, (_, unit) in enumerate(made.units):
        subclass_in_place(unit, {"forward": _intercepted(made, index, type(unit).forward)})
    device = comm.group.device
    for module in model.modules():
        if isinstance(getattr(type(module), "device", None), property):
            subclass_in_place(module, {"device": property(lambda self: device)})
    read = functools.partial(made.read, cut=cut)
    Boundary(device, made.call, read, on_all=True, turn=turn).install(model, "")
    subclass_in_place(model, {"shardit_layerwise": property(lambda self: made)})
    return made


def _intercepted(made: LayerwiseEncoder, index: int, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return made.unit_call(index, plain.__get__(self), args, kwargs)

    return forward


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts. Other containers (caches) hold tensors local to a rank."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
