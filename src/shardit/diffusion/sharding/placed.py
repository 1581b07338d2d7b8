"""Notes on components that are sharded, for pipelines that share them and for changes that come later."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.modules.fingerprint import PROCESSOR, Change, Fingerprint
from shardit.core.modules.hints import Plan
from shardit.core.modules.patching import plain_class, subclass_in_place
from shardit.core.modules.snapshot import PLAIN
from shardit.core.placement.assignment import Assignment
from shardit.core.runtime.digests import short_hash
from shardit.core.runtime.randomness import dropout_in_training
from shardit.core.stages.runtime import Runtime
from shardit.diffusion.class_homes import MODELS
from shardit.diffusion.sharding.adapters import fusing, unpadded
from shardit.diffusion.sharding.changes import cut_blocks, follow, unwrap_parts
from shardit.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from shardit.parallel.tensor.plan import TensorPlan


KNOWN = ("fuse_qkv_projections", "unfuse_qkv_projections", "_apply")
"""Methods of models that change them in a way that is right: they put linears next to others, made of those, or bring
all parameters (with `_apply`, which stands behind `to`, `half` ...) to another dtype or memory format."""


ORDERED = (list, tuple, dict)
"""Collections of settings whose text is the same on every rank."""


_WITHIN: WeakKeyDictionary[nn.Module, tuple[str, bool]] = WeakKeyDictionary()
"""The modules inside components that are sharded: what messages call the component, and whether every rank has all of
the module's own parameters."""


@dataclass(eq=False)
class Placed:
    """One component that is sharded.

    name: in the pipeline with which it was sharded. denoises: all ranks take part in each of its calls, which begin at
    its `__call__`; else one rank, or one for each of its units, runs its methods. assignment: None for a model that was
    sharded by itself. slices: how its linears are cut over tensor ranks.
    """

    name: str
    module: nn.Module
    config: DiffusionParallelConfig
    runtime: Runtime
    denoises: bool
    plan: Plan | None = None
    assignment: Assignment | None = None
    slices: TensorPlan | None = None
    _taken: Fingerprint = field(init=False, repr=False)
    _methods: dict[str, Any] = field(init=False, repr=False)
    _history: bytes = field(init=False, repr=False, default=b"")

    def __post_init__(self) -> None:
        known = [name for name in KNOWN if self.denoises and hasattr(self.module, name)]
        members: dict[str, Any] = {name: self._known(name) for name in known}
        if self.denoises and hasattr(self.module, "set_attn_processor"):
            members["set_attn_processor"] = self._setting_processors()
        own_fuse = getattr(type(self.module), "fuse_lora", None)
        if own_fuse is not None:
            members["fuse_lora"] = fusing(own_fuse, self.runtime.replica, lambda model: [model])
        if not self.denoises or self.runtime.mesh.pp_size > 1:
            members |= unpadded(type(self.module), self.title, self.denoises)
        subclass_in_place(self.module, {**members, "shardit_placed": property(lambda module: self)})
        missing = self._not_everywhere()
        for name, part in self.module.named_modules():
            if part is not self.module:
                _WITHIN[part] = (self.title, name not in missing)
        self.take()

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name or type(self.module).__name__

    def take(self) -> None:
        """Take the component as it is now for what is right."""
        self._taken, self._methods = Fingerprint(self.module, self._set_up()), _own_methods(self.module)

    def _set_up(self) -> list[str]:
        """Return the names of modules whose settings are compared: not those of torch, which act on each element or are
        known, nor adapters."""
        if not self.denoises and self.slices is None:
            return []
        named = self.module.named_modules()
        theirs = "torch.nn.", "torch.ao."
        own = (name for name, part in named if not (hasattr(part, "base_layer") or _home(part).startswith(theirs)))
        return list(own)

    def begin(self) -> dict[str, Any]:
        """`check`, before a call; what all ranks must have alike, by what messages call it: hooks that users have put
        on modules, and a hash of all changes so far."""
        self.check()
        found: dict[str, Any] = {f"changes of {self.title}": self._history} if self._history else {}
        hooked = self._taken.hooked()
        return {**found, f"hooks of {self.title}": hooked} if hooked else found

    def end(self) -> None:
        """Take the settings as they are after a call for what is right: a forward may count its calls in one."""
        self._taken.update_settings()
        stages = getattr(self.module, "shardit_stages", None)
        if stages is not None:
            stages.first.end()

    def check(self) -> None:
        """Follow what was changed since it was sharded, or raise UnsupportedError, on every rank alike."""
        changes = self._taken.changes() if self._taken.changed() else []
        if changes:
            self._finish_calls()
            unwrap_parts(self.module)
            self._record(*(_told(change) for change in changes))
            follow(self, changes)
            self.take()
        if not self.denoises and self.slices is None:
            now = _own_methods(self.module)
            name = next((name for name, method in now.items() if self._methods.get(name) is not method), None)
            if name is not None:
                raise UnsupportedError(
                    f"{self.title}.{name} was replaced on the object after parallelize, so every rank would run it, "
                    "but one alone has the weights: replace (compile, wrap) it before"
                )
        elif self._taken.training():
            self._refuse_dropout()

    def _finish_calls(self) -> None:
        """Let calls in flight go on to their end with the model as it was when they began."""
        if self.runtime.schedule.active:
            with self._taken.undone():
                self.runtime.schedule.drain()

    def _record(self, *changes: str) -> None:
        self._history = short_hash(self._history, *(change.encode() for change in changes))

    def _known(self, name: str) -> Callable[..., Any]:
        """A method that changes the model, and does so right however it is sharded."""
        own_method = getattr(type(self.module), name)

        @functools.wraps(own_method)
        def method(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.check()  # what was changed before is none of this method's
            self.runtime.schedule.drain()  # calls in flight are of the model as it was
            out = own_method(module, *args, **kwargs)
            follow(self, [])
            self._record(name)
            self.take()
            return out

        return method

    def _setting_processors(self) -> Callable[..., Any]:
        """`set_attn_processor`, which pipelines call in the middle of their own call, too: what is known of the model's
        calls may not hold for a processor that is not the library's, so they are watched again."""
        own_method: Callable[..., Any] = getattr(type(self.module), "set_attn_processor")  # noqa: B009

        @functools.wraps(own_method)
        def set_attn_processor(module: Any, *args: Any, **kwargs: Any) -> Any:
            out = own_method(module, *args, **kwargs)
            stages = getattr(module, "shardit_stages", None)
            if stages is not None and not all(map(_is_librarys, _processor_classes(module))):
                stages.forget()
            return out

        return set_attn_processor

    def _refuse_dropout(self) -> None:
        part = dropout_in_training(self.module)
        if part is not None:
            raise UnsupportedError(
                f"{self.title} is in training mode, and {part} would drop other values on each rank: call .eval() on it"
            )

    def bytes_of(self, member: int) -> float:
        """About how many bytes a member of a replica holds of it; 0 of a model that was sharded by itself."""
        return self.assignment.held[self.name][member] if self.assignment is not None else 0.0

    def _not_everywhere(self) -> set[str]:
        """The names of the modules that have parameters of their own which some rank has not, or a slice of only."""
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


def _is_librarys(processor: type) -> bool:
    """Whether a class of attention processors is one of diffusers', which keep nothing from call to call."""
    return processor.__module__.startswith(MODELS)


def _home(module: nn.Module) -> str:
    """Return the Python module of the class before sharding, with a dot at the end."""
    return f"{plain_class(module).__module__}."


def _told(change: Change) -> str:
    """A change in words that are the same on every rank."""
    values = (
        repr(v) if type(v) in (*PLAIN, *ORDERED) else plain_class(v).__qualname__ for v in (change.before, change.now)
    )
    return " ".join((change.path, *values))


def _own_methods(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that replace methods of its class, and so hide the interceptor at calls from outside."""
    cls = type(module)
    return {
        name: value for name, value in vars(module).items() if callable(value) and callable(getattr(cls, name, None))
    }


def placed_on(module: Any) -> Placed | None:
    """How a module is sharded; None where it is not."""
    return getattr(module, "shardit_placed", None) if isinstance(module, nn.Module) else None


def check_earlier(
    earlier: Mapping[str, Placed], config: DiffusionParallelConfig, plans: Plan | Mapping[str, Plan] | None
) -> None:
    """Look at those of some modules that were sharded `earlier`. Raises InputError where that was done in another way
    than it is asked for now, or where they come from pipelines that were sharded without sharing anything."""
    for name, placed in earlier.items():
        what = name or type(placed.module).__name__
        if placed.config != config:
            raise InputError(
                f"{what} is already sharded, with {_differences(placed.config, config)}: use the same configuration "
                "for all pipelines that share it, or load it again"
            )
        plan = plans if isinstance(plans, Plan) or plans is None else plans.get(name)
        if plan is not None and plan != placed.plan:
            raise InputError(f"{what} is already sharded, with {placed.plan}: leave out the plan, or load it again")
    runtimes = {id(placed.runtime): name for name, placed in earlier.items()}
    if len(runtimes) > 1:
        first, second, *_ = runtimes.values()
        raise InputError(
            f"{first} and {second} were sharded as parts of different pipelines, which take turns of their own: make "
            "the pipelines that share components before parallelize, or load the components again"
        )


def refuse_overlap(name: str, module: nn.Module) -> None:
    """Raise UnsupportedError if a module that is not sharded is inside one that is, or the other way round, or uses
    weights of it that some ranks do not have: it would be sharded once more, by ranks that have a part of it only."""
    remedy = "give each weights of its own (load it again, or copy.deepcopy it before parallelize)"
    if module in _WITHIN:
        raise UnsupportedError(f"{name} is a part of {_WITHIN[module][0]}, which is already sharded: {remedy}")
    for path, part in module.named_modules():
        placed = placed_on(part)
        title, everywhere = (placed.title, False) if placed is not None else _WITHIN.get(part, ("", True))
        if not everywhere:
            whose = title if placed is not None else f"a part of {title}"
            raise UnsupportedError(f"{name}.{path} is {whose}, which is already sharded: {remedy}")


def _differences(one: DiffusionParallelConfig, other: DiffusionParallelConfig) -> str:
    pairs = {name: (value, getattr(other, name)) for name, value in vars(one).items()}
    return ", ".join(f"{name}={was!r} (now {now!r})" for name, (was, now) in pairs.items() if was != now)
