"""Compares cut modules with whole ones: names and shapes do not show how code uses its heads.

The code between cut linears (attention and its processor, activations) may be custom. So at the first call of each kind
a unit of the plan runs on its slices and, with temporarily gathered weights, whole. If the results differ, or the
slices fail, such units are whole on every rank from then on, and are named in a warning.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_flatten, tree_leaves

from shardit.core.comm.collectives import Collectives
from shardit.core.components.kv_stand_ins import find_caches
from shardit.core.modules.fingerprint import FORWARD, PROCESSOR
from shardit.core.modules.patching import Subclasses, share_subclass, subclass_in_place
from shardit.core.runtime.digests import checksum
from shardit.core.runtime.flat_call import modes
from shardit.core.runtime.numbers_seen import NumbersSeen
from shardit.core.runtime.pending import materialize
from shardit.core.runtime.yielding import without_yielding, yielding_coroutine
from shardit.errors import UnsupportedError
from shardit.parallel.attention.hook import attention_is_intercepted
from shardit.parallel.block_signature import fingerprint, value_key
from shardit.parallel.tensor.check.compare import Comparison, is_agent
from shardit.parallel.tensor.check.kept import exposing_attribute
from shardit.parallel.tensor.gather_module import make_whole
from shardit.parallel.tensor.heads import join
from shardit.parallel.tensor.plan import TensorPlan
from shardit.parallel.tensor.processors import adopt_processors, attentions_in, mark_cut
from shardit.parallel.tensor.rules import Family

log = logging.getLogger(__name__)

NAME = "shardit_unit"
"""The attribute of a unit that has its name."""

PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")
"""Attributes that number otherwise equal modules. Classes from the library of the model look up their caches with
these; other code may do anything with them."""


@dataclass
class Checks:
    """The comparisons of one cut component.

    title: its name in messages. compared: number of compared units. pending: names of units to compare at their next
    call. whole: units that need whole weights, and why. for_training: such units are refused, since others hold their
    parameters.
    """

    title: str
    model: nn.Module
    plan: TensorPlan
    ranks: Collectives
    compared: int = 0
    pending: set[str] = field(default_factory=set)
    whole: dict[str, str] = field(default_factory=dict)
    for_training: bool = False
    _right: set[Any] = field(default_factory=set)
    _numbers: NumbersSeen = field(default_factory=NumbersSeen)
    _given: Any = None
    _calls: set[Any] = field(default_factory=set)
    _attentions: dict[str, nn.Module] = field(default_factory=dict)
    _asked: bool = False
    comparing: bool = False

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Begin a call of the component: if it is of a new kind, or processors have changed, its units are compared."""
        found = [getattr(attention, PROCESSOR) for attention in self._attentions.values()]
        processors = tuple(p if isinstance(p, nn.Module) else type(p) for p in found)
        numbers: list[float] = []
        outline = _outline(args, numbers), _outline(kwargs, numbers)
        given = self._numbers.kind(numbers)
        key = (outline, given, torch.is_inference_mode_enabled(), self.model.training, processors)
        if key in self._calls:
            return nullcontext()
        self._given = outline, given
        adopt_processors(self._attentions, self.plan, self.ranks)
        return self._looking(key, bool(kwargs.get("output_attentions")) and not self.plan.family.gathers_attentions)

    def forget(self) -> None:
        """Forget all comparisons after a change of the model."""
        self._calls.clear()
        self._right.clear()

    @contextmanager
    def _looking(self, key: Any, attentions: bool) -> Iterator[None]:
        self.pending.update(self.plan.units)
        self._asked = attentions
        # Code compiled now would see slices come and go. (In a coroutine, others would be left with the setting.)
        compiles = "torch._dynamo" in sys.modules and yielding_coroutine.get() is None
        try:
            with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
                yield
        except Exception:
            raise
        except BaseException:  # stages leave a forward early
            self._calls.add(key)
            raise
        else:
            self._calls.add(key)
        finally:
            self.pending.clear()
            self._asked = False

    def call(self, unit: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of a pending unit; `plain` is its own forward."""
        name = vars(unit)[NAME]
        if self.comparing or attention_is_intercepted():
            return plain(unit, *args, **kwargs)
        self.pending.discard(name)
        leaves, spec = tree_flatten((args, kwargs))
        materialize(leaves)
        values = tuple(map(value_key, leaves))
        kind = (self._kind(name), str(spec), values, self._given, modes(), unit.training, self._asked)
        if kind in self._right or _filled(unit, args, kwargs):
            return plain(unit, *args, **kwargs)
        self.comparing = True
        try:
            with without_yielding():  # no other call may use modules that are temporarily whole
                return self._compared(unit, name, kind, plain, args, kwargs)
        finally:
            self.comparing = False

    def _compared(
        self, unit: Any, name: str, kind: Any, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compare a unit at its call, make it whole if slices are wrong, and return its result."""
        why = incomparable_reason(unit, self.plan.family)
        if why is None:
            comparison = Comparison(self.model, name, self.plan, self.ranks, plain, args, kwargs, self._asked)
            out, why = comparison.sliced(), comparison.why
            self.compared += 1
            if comparison.right:
                self._right.add(kind)
                return out
            if comparison.failure is not None:  # the call is wrong, not the slices
                self.pending.add(name)
                raise comparison.failure
        with without_modes():
            self._give_up(name, why)
        return plain(unit, *args, **kwargs)

    def _kind(self, name: str) -> Any:
        """Return a key for units that are cut alike and run the same code; the same on all ranks or on none."""
        inside = f"{name}." if name else ""
        totals = [(key[len(inside) :], cut) for key, cut in self.plan.cuts.items() if key.startswith(inside)]
        unit = self.model.get_submodule(name)
        return fingerprint(unit, self._ignored), tuple(map(_contents, unit.modules())), tuple(totals)

    def _ignored(self, cls: type) -> tuple[str, ...]:
        """Return the attributes of a class that do not decide of which kind a unit is."""
        own, of_model = (one.__module__.partition(".")[0] for one in (cls, type(self.model)))
        return (NAME, *PLACES) if own in (of_model, *self.plan.family.libraries) else (NAME,)

    def _give_up(self, name: str, why: str) -> None:
        """Make all units like this one whole."""
        kind, unit = self._kind(name), self.model.get_submodule(name)
        alike = [n for n in self.plan.units if self._kind(n) == kind and not _has_meta(self.model.get_submodule(n))]
        processor = getattr(unit, PROCESSOR, None)
        code = type(unit).__name__ + (f" with {type(processor).__name__}" if processor is not None else "")
        why = f"{code} {why}"
        if self.for_training:
            drops = active_dropout(unit)
            remedy = (
                "" if drops is None else f"set the probability of {drops}, which drops other values there, to 0, or "
            )
            raise UnsupportedError(f"{self.title}: {name} cannot train: {why}: {remedy}use tensor_parallel_size=1")
        if any(type(self.model.get_submodule(one)) is type(unit) for one in self.plan.borrowers):
            text = f"{self.title}: {name} {why}, and other layers take its keys: use tensor_parallel_size=1"
            raise UnsupportedError(text)
        for other in alike:
            make_whole(self.model, other, self.plan, self.ranks)
            self.plan.units.remove(other)
            self.pending.discard(other)
            self.whole[other] = why
        if self.ranks.group.rank == 0:
            more = f" and {len(alike) - 1} more like it" if len(alike) > 1 else ""
            log.warning("%s: %s%s are whole on every tensor rank from now on: %s", self.title, name, more, why)


def active_dropout(unit: nn.Module) -> str | None:
    """Return the name of a module, or of an attribute, that makes a unit drop values in training; None if none does."""
    for name, module in unit.named_modules():
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            return name
        for key, value in vars(module).items():
            if module.training and "dropout" in key and isinstance(value, float) and value > 0:
                return join(name, key)
    return None


def _contents(module: nn.Module) -> tuple[Any, ...]:
    """Return checksums of the tensors of a module that are no parameters."""
    tensors = {**module._buffers, **vars(module)}
    return tuple((name, checksum(t)) for name, t in sorted(tensors.items()) if isinstance(t, torch.Tensor))


def _outline(value: Any, numbers: list[float]) -> Any:
    """Return structure, types and dimensions of the arguments, as `mode_key` does in ten times its time, and values
    that control code. Adds numbers to `numbers`."""
    if isinstance(value, torch.Tensor):
        return (value.ndim, value.dtype)
    if isinstance(value, dict):
        return tuple((name, _outline(v, numbers)) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_outline(item, numbers) for item in value)
    if type(value) in (bool, str):
        return value
    if type(value) in (int, float):
        numbers.append(value)
    return type(value)


def _has_meta(unit: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in unit.parameters())


def incomparable_reason(unit: nn.Module, family: Family) -> str | None:
    """Return the reason why a unit cannot be compared: one of its processors exposes its results for each head."""
    keys = [exposing_attribute(getattr(module, PROCESSOR, None), family) for module in unit.modules()]
    return next((f"may expose its results for each head, in {key!r}" for key in keys if key), None)


def _filled(unit: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a cache has keys of earlier calls, of this rank's heads: a whole unit could not continue with
    them."""
    place = vars(unit).get("layer_idx")
    for cache in find_caches(args, kwargs):
        if place in range(len(cache.layers)):
            held = tree_leaves(list(vars(cache.layers[place]).values()))
        else:  # its caller names the layer
            held = [getattr(layer, "keys", None) for layer in cache.layers]
        if any(isinstance(found, torch.Tensor) and found.ndim > 1 and found.numel() for found in held):
            return True  # (lengths and windows are single numbers)
    agents = (leaf for leaf in tree_leaves((args, kwargs)) if is_agent(leaf) and not hasattr(leaf, "layers"))
    values = (value for leaf in agents for value in tree_leaves(list(vars(leaf).values())))
    return any(isinstance(value, torch.Tensor) and value.numel() for value in values)


def watch_units(title: str, model: nn.Module, plan: TensorPlan, ranks: Collectives) -> Checks:
    """Compare the units of a cut model, in place, at the calls that need it."""
    attentions, made = attentions_in(model, plan.units), Subclasses()
    checks = Checks(title, model, plan, ranks, pending=set(plan.units), _attentions=attentions)
    for attention in attentions.values():
        mark_cut(attention)
    for name in plan.units:
        unit: Any = model.get_submodule(name)
        vars(unit)[NAME] = name
        plain = type(unit)
        members = {"forward": _intercepted(checks, plain.forward), "__call__": _called(checks, plain.__call__)}
        share_subclass(unit, made, (), lambda: members)  # noqa: B023
    own_call = type(model).__call__

    @functools.wraps(own_call)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with checks.begin(args, kwargs):
            return own_call(self, *args, **kwargs)

    subclass_in_place(model, {"__call__": __call__, "shardit_checks": property(lambda self: checks)})
    return checks


def _intercepted(checks: Checks, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if checks.pending and self.shardit_unit in checks.pending:
            return checks.call(self, plain, args, kwargs)
        return plain(self, *args, **kwargs)

    return forward


def _called(checks: Checks, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that compares a unit even if a forward on the object hides that of its class."""

    @functools.wraps(plain)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if checks.pending and FORWARD in vars(self) and self.shardit_unit in checks.pending:
            return checks.call(self, plain, args, kwargs)
        return plain(self, *args, **kwargs)

    return __call__
