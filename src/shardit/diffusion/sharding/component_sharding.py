"""Records of sharded components, for pipelines that share them and for later changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.modules.compiled import unwrap_parts
from shardit.core.modules.fingerprint import PROCESSOR, Change, Fingerprint
from shardit.core.modules.hints import Plan
from shardit.core.modules.patching import plain_class, subclass_in_place
from shardit.core.modules.snapshot import COLLECTIONS, PLAIN
from shardit.core.placement.assignment import Assignment
from shardit.core.runtime.digests import short_hash
from shardit.core.runtime.randomness import DrawsWithoutData, dropout_in_training
from shardit.core.runtime.thread_state import refuse_profiler
from shardit.core.runtime.versions import writes
from shardit.core.stages.runtime import Runtime
from shardit.diffusion.class_homes import MODELS
from shardit.diffusion.family import LIBRARIES
from shardit.diffusion.sharding.adapters import AdapterScales, collective_fuse, unpadded_members
from shardit.diffusion.sharding.changes import apply_changes, cut_blocks
from shardit.errors import InputError, UnsupportedError
from shardit.parallel.tensor.check.slices import HeldSlice, first_problem, slices_of

if TYPE_CHECKING:
    from shardit.parallel.tensor.plan import TensorPlan


SAFE_METHODS = ("fuse_qkv_projections", "unfuse_qkv_projections", "_apply")
"""Methods that change sharded models correctly: they add linears made from existing ones, or convert all parameters
(`_apply`, used by `to`, `half` ...) to another dtype or memory format."""


_PARENTS: WeakKeyDictionary[nn.Module, tuple[str, bool]] = WeakKeyDictionary()
"""For each module inside a sharded component: the title of the component, and whether every rank has all of the
module's own parameters."""


@dataclass(eq=False)
class ComponentSharding:
    """One sharded component.

    name: in the pipeline with which it was sharded. denoises: all ranks take part in each of its calls, which begin at
    its `__call__`; otherwise one rank, or one per unit, runs its methods. assignment: None for a model that was sharded
    outside a pipeline. slices: of its linears, over tensor ranks.
    """

    name: str
    module: nn.Module
    config: DiffusionParallelConfig
    runtime: Runtime
    denoises: bool
    plan: Plan | None = None
    assignment: Assignment | None = None
    slices: TensorPlan | None = None
    _fingerprint: Fingerprint = field(init=False, repr=False)
    _methods: dict[str, Any] = field(init=False, repr=False)
    _adapters: AdapterScales | None = field(init=False, repr=False)
    _slices: list[HeldSlice] = field(init=False, repr=False)
    _weights: list[nn.Parameter] = field(init=False, repr=False)
    _written: int = field(init=False, repr=False)
    _foreign: bool = field(init=False, repr=False)
    _calls: list[Any] = field(init=False, repr=False)
    _history: bytes = field(init=False, repr=False, default=b"")
    _last: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        safe = [name for name in SAFE_METHODS if self.denoises and hasattr(self.module, name)]
        members: dict[str, Any] = {name: self._safe_method(name) for name in safe}
        if self.denoises and hasattr(self.module, "set_attn_processor"):
            members["set_attn_processor"] = self._processor_setter()
        own_fuse = getattr(type(self.module), "fuse_lora", None)
        if own_fuse is not None:
            members["fuse_lora"] = collective_fuse(own_fuse, self.runtime.replica, lambda model: [model])
        if not self.denoises or self.runtime.mesh.pp_size > 1:
            members |= unpadded_members(type(self.module), self.title, self.denoises)
        subclass_in_place(self.module, {**members, "shardit_sharding": property(lambda module: self)})
        partial = self._partial_modules()
        for name, part in self.module.named_modules():
            if part is not self.module:
                _PARENTS[part] = (self.title, name not in partial)
        self.update()
        boundary = getattr(self.module, "shardit_boundary", None)
        if boundary is not None:
            boundary.own_code = lambda: self._fingerprint.own_code()

    @property
    def title(self) -> str:
        """Return its name in messages."""
        return self.name or type(self.module).__name__

    def update(self) -> None:
        """Record the component's present state, so that later changes are relative to it."""
        self._fingerprint = Fingerprint(self.module, self._configured_modules())
        self._methods = _own_methods(self.module)
        self._adapters = AdapterScales(self.module) if self.denoises else None
        self._slices = slices_of(self.module, self.slices) if self.slices is not None else []
        self._weights = list(self.module.parameters())
        self._written = writes(self._weights)
        self._foreign = self._fingerprint.processors_outside(LIBRARIES.own)
        found = (getattr(self.module, name, None) for name in ("shardit_stages", "shardit_overlap"))
        self._calls = [calls for calls in found if calls is not None]

    def _configured_modules(self) -> list[str]:
        """Return the names of modules whose settings are compared: neither those of torch, which act elementwise or are
        known, nor adapters."""
        named = self.module.named_modules()
        theirs = "torch.nn.", "torch.ao."
        own = (
            name for name, part in named if not (hasattr(part, "base_layer") or _class_module(part).startswith(theirs))
        )
        return list(own)

    def begin(self) -> dict[str, Any]:
        """Check the component before a call. Return the state that must be equal on all ranks, by its name in messages:
        hooks of users on modules, and a hash of all changes so far."""
        refuse_profiler()
        self.check()
        self._check_weights()
        found: dict[str, Any] = {f"changes of {self.title} ({self._last})": self._history} if self._history else {}
        if self._adapters is not None and (scales := self._adapters.hash()):
            found[f"adapters of {self.title}"] = scales
        hooked = self._fingerprint.hooked()
        for calls in self._calls:
            calls.relearn(bool(hooked) or self._foreign, bool(self._adapters and self._adapters.any))
        return {**found, f"hooks of {self.title}": hooked} if hooked else found

    def _check_weights(self) -> None:
        """Raise UnsupportedError if weights were written to while a call is in flight, of which ranks have made a part.
        Within a pipeline nobody does."""
        if not self.runtime.watches:
            return
        before, self._written = self._written, writes(self._weights)
        if before != self._written and self.runtime.schedule.active:
            raise UnsupportedError(
                f"weights of {self.title} were changed in place while a call of it is in flight: use the result of the "
                "call before"
            )

    def end(self) -> None:
        """Record the settings after a call: a forward may count its calls in one."""
        self._fingerprint.update_settings()
        stages = getattr(self.module, "shardit_stages", None)
        if stages is not None:
            stages.first.end()

    def check(self) -> None:
        """Apply all changes since it was sharded, or raise UnsupportedError, on every rank alike."""
        if (found := first_problem(self._slices)) is not None:
            one, problem = found
            raise UnsupportedError(
                f"{self.title}.{one.name} {problem} after parallelize, but each tensor rank has a slice "
                f"({list(one.shape)}): use load_state_dict, or change it before"
            )
        one_rank = not self.denoises and self.slices is None
        if one_rank:
            self._refuse_own_methods()
        changes = self._fingerprint.changes() if self._fingerprint.changed() else []
        if changes:
            self._finish_calls()
            unwrap_parts(self.module)
            self._record(*(_describe(change) for change in changes))
            self._last = _shortened([change.path for change in changes])
            apply_changes(self, changes)
            self.update()
        if not one_rank and self._fingerprint.training():
            self._refuse_dropout()

    def _finish_calls(self) -> None:
        """Finish calls in flight with the model as it was when they began."""
        if self.runtime.schedule.active:
            with self._fingerprint.undone():
                self.runtime.schedule.drain()

    def _record(self, *changes: str) -> None:
        self._history = short_hash(self._history, *(change.encode() for change in changes))

    def _safe_method(self, name: str) -> Callable[..., Any]:
        """Return the wrapper of a method that changes the model correctly with any sharding."""
        own_method = getattr(type(self.module), name)

        @functools.wraps(own_method)
        def method(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.check()  # earlier changes are checked separately
            self.runtime.schedule.drain()  # calls in flight use the unchanged model
            with DrawsWithoutData(self.runtime.mesh.device):
                out = own_method(module, *args, **kwargs)
            apply_changes(self, [])
            self._record(name)
            self._last = f"{name}()"
            self.update()
            return out

        return method

    def _processor_setter(self) -> Callable[..., Any]:
        """Return the wrapper of `set_attn_processor`, which pipelines also call during their own call: plans may not
        hold with a processor from outside the library, so the model's calls are traced again."""
        own_method: Callable[..., Any] = getattr(type(self.module), "set_attn_processor")  # noqa: B009

        @functools.wraps(own_method)
        def set_attn_processor(module: Any, *args: Any, **kwargs: Any) -> Any:
            out = own_method(module, *args, **kwargs)
            stages = getattr(module, "shardit_stages", None)
            if stages is not None and not all(map(_is_from_library, _processor_classes(module))):
                stages.forget()
            return out

        return set_attn_processor

    def _refuse_own_methods(self) -> None:
        now = _own_methods(self.module)
        name = next((name for name, method in now.items() if self._methods.get(name) is not method), None)
        if name is not None:
            raise UnsupportedError(
                f"{self.title}.{name} was replaced on the object after parallelize, so every rank would run it, "
                "but one alone has the weights: replace (compile, wrap) it before"
            )

    def _refuse_dropout(self) -> None:
        part = dropout_in_training(self.module)
        if part is not None:
            raise UnsupportedError(
                f"{self.title} is in training mode, and {part} would drop other values on each rank: call .eval() on it"
            )

    def bytes_of(self, member: int) -> float:
        """Return the estimated bytes that a member of a replica holds of it; 0 for a model outside a pipeline."""
        return self.assignment.held[self.name][member] if self.assignment is not None else 0.0

    def _partial_modules(self) -> set[str]:
        """Return the names of modules whose own parameters are missing or sliced on some rank."""
        names = [name for name, _ in self.module.named_parameters(remove_duplicate=False)]
        if self.assignment is not None:
            members = range(len(self.assignment.stages))
            owns = [self.assignment.owns(self.name, member) for member in members]
        else:
            inside = tuple(f"{name}." for name, _ in cut_blocks(self.module) if self.runtime.mesh.pp_size > 1)
            owns = [lambda name: not name.startswith(inside)]
        cuts = self.slices.cuts if self.slices is not None else {}
        partial = [name for name in names if name in cuts or not all(owned(name) for owned in owns)]
        return {name.rpartition(".")[0] for name in partial}


def _processor_classes(model: nn.Module) -> set[type]:
    return {type(own[PROCESSOR]) for own in map(vars, model.modules()) if PROCESSOR in own}


def _is_from_library(processor: type) -> bool:
    """Return whether a class of attention processors is from diffusers: those keep no state between calls."""
    return processor.__module__.startswith(MODELS)


def _class_module(module: nn.Module) -> str:
    """Return the Python module of the class before sharding, with a dot at the end."""
    return f"{plain_class(module).__module__}."


def _describe(change: Change) -> str:
    """Describe a change with text that is equal on every rank."""
    return " ".join((change.path, _value_text(change.before), _value_text(change.now)))


def _value_text(value: Any) -> str:
    """Describe a value. Objects, also inside collections, are named by their class: their `repr` may have an
    address."""
    if isinstance(value, COLLECTIONS):
        items = map(_value_text, value.items() if isinstance(value, dict) else value)
        return f"{type(value).__name__}({', '.join(sorted(items) if isinstance(value, (set, frozenset)) else items)})"
    return repr(value) if type(value) in PLAIN else plain_class(value).__qualname__


def _shortened(paths: list[str]) -> str:
    """Return the first of several names, and how many there are."""
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _own_methods(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that replace methods of its class, and so hide their interceptors."""
    cls = type(module)
    return {
        name: value for name, value in vars(module).items() if callable(value) and callable(getattr(cls, name, None))
    }


def sharding_of(module: Any) -> ComponentSharding | None:
    """Return the record of a sharded module; None for any other."""
    return getattr(module, "shardit_sharding", None) if isinstance(module, nn.Module) else None


def check_earlier(
    earlier: Mapping[str, ComponentSharding], config: DiffusionParallelConfig, plans: Plan | Mapping[str, Plan] | None
) -> None:
    """Raise InputError if modules that were sharded `earlier` have another configuration than is requested now, or come
    from different pipelines that were sharded separately."""
    for name, sharding in earlier.items():
        title = name or type(sharding.module).__name__
        if sharding.config != config:
            raise InputError(
                f"{title} is already sharded, with {_differences(sharding.config, config)}: use the same configuration "
                "for all pipelines that share it, or load it again"
            )
        plan = plans if isinstance(plans, Plan) or plans is None else plans.get(name)
        if plan is not None and plan != sharding.plan:
            raise InputError(f"{title} is already sharded, with {sharding.plan}: leave out the plan, or load it again")
    runtimes = {id(sharding.runtime): name for name, sharding in earlier.items()}
    if len(runtimes) > 1:
        first, second, *_ = runtimes.values()
        raise InputError(
            f"{first} and {second} were sharded as parts of different pipelines, which are scheduled separately: make "
            "the pipelines that share components before parallelize, or load the components again"
        )


def refuse_overlap(name: str, module: nn.Module) -> None:
    """Raise UnsupportedError if an unsharded module is inside a sharded one, contains one, or uses weights of one that
    some ranks do not have: it would be sharded again, by ranks that have only a part of it."""
    remedy = (
        "parallelize the pipeline that has both before you make others from it, or give each weights of its own "
        "(copy.deepcopy one before it is sharded)"
    )
    if module in _PARENTS:
        raise UnsupportedError(f"{name} is a part of {_PARENTS[module][0]}, which is already sharded: {remedy}")
    for path, part in module.named_modules():
        if hasattr(part, "shardit_decoder"):
            title = f"{name}.{path}" if path else name
            raise UnsupportedError(f"{title} is sharded by itself: load it again, and give only the whole model")
        sharding = sharding_of(part)
        title, replicated = (sharding.title, False) if sharding is not None else _PARENTS.get(part, ("", True))
        if not replicated:
            whose = title if sharding is not None else f"a part of {title}"
            raise UnsupportedError(f"{name}.{path} is {whose}, which is already sharded: {remedy}")


def _differences(one: DiffusionParallelConfig, other: DiffusionParallelConfig) -> str:
    pairs = {name: (value, getattr(other, name)) for name, value in vars(one).items()}
    return ", ".join(f"{name}={was!r} (now {now!r})" for name, (was, now) in pairs.items() if was != now)
