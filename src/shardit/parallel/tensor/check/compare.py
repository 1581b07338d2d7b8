"""Compares a cut unit with the same unit made whole, on the same input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from shardit.core.comm.collectives import Collectives
from shardit.core.components.kv_stand_ins import copy_empty_layers, find_caches
from shardit.core.modules.state.module_state import State, copy_aliases, new_values, restore, state_of
from shardit.core.placement.gathered import gathered
from shardit.core.placement.slices import shards
from shardit.core.runtime.randomness import States, is_generator, moved, set_states, states
from shardit.errors import RankError
from shardit.parallel.tensor.gather_module import temporarily_whole
from shardit.parallel.tensor.plan import TensorPlan
from shardit.parallel.tensor.rules import HEAD_COUNTS

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1.6e-2}
"""Largest relative L2 difference between the result on slices and the whole result. Wrong heads give 0.1 and more, sums
in another order 1e-6 in float32. Many models compute norms in float32 whatever their type, so float64 is not 1e-12."""


class _FailedElsewhere(Exception):
    """The unit has failed on another rank."""


@dataclass
class Comparison:
    """A call of unit `name` of a model with these arguments; `plain` is its own forward. attentions: the attention
    weights of each head were requested.

    right: slices gave the same result as the whole unit on every rank; why: the difference; failure: the error of the
    whole unit, if it fails, too. Collective.
    """

    model: nn.Module
    name: str
    plan: TensorPlan
    ranks: Collectives
    plain: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attentions: bool = False
    right: bool = False
    why: str = ""
    failure: Exception | None = None
    _sums: list[torch.Tensor] = field(default_factory=list)
    _given: list[Any] = field(default_factory=list)

    def sliced(self) -> Any:
        """Return the unit's result on slices. If that is wrong, the arguments are restored."""
        unit, leaves = self.model.get_submodule(self.name), tree_flatten((self.args, self.kwargs))[0]
        with without_modes(), torch.no_grad():
            self._given = [leaf for leaf in leaves if is_generator(leaf)]
            twins, before, generators = _copies(leaves), state_of(unit, self._given), self._random_state()
            kept = [(leaf, dict(vars(leaf))) for leaf in leaves if is_agent(leaf)]
            caches = [(cache, copy_empty_layers(cache)) for cache in find_caches(self.args, self.kwargs)]
        out = error = None
        try:
            out = self._run(unit, self.args, self.kwargs, together=True)
            self._all(True)
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as failure:  # code that relies on all heads may fail in any way
            error = failure
            if not isinstance(failure, _FailedElsewhere):
                self._all(False)
        with without_modes(), torch.no_grad():
            after, later = state_of(unit, self._given), self._random_state()
            if error is None:
                self._sums += new_values(before, after)
                self.right = self._is_right(unit, copy_aliases(before, out), twins, before, generators)
                restore(after)
            if self.right:
                self._set_random_state(later)
                return out
            self.why = f"fails on slices ({error})" if error is not None else "gives another result on slices"
            self.failure = error and self._failure_of_whole(unit, twins, before, generators)
            restore(before)
            self._set_random_state(generators)
            for leaf, values in kept:
                vars(leaf).clear()
                vars(leaf).update(values)
            for cache, layers in caches:
                cache.layers[:] = layers
            for leaf, twin in zip(leaves, twins, strict=True):
                if isinstance(leaf, torch.Tensor) and not _same(leaf, twin):
                    leaf.copy_(twin)
        return None

    def _failure_of_whole(
        self, unit: nn.Module, twins: list[Any], before: State, generators: States
    ) -> Exception | None:
        """Return the error of the whole unit with the same arguments, which then are wrong, on any tensor rank; None if
        there is none."""
        _, failure = self._run_whole(unit, twins, before, generators)
        if not self._all(failure is None) and failure is None:
            return RankError(-1, f"{self.name} fails with these arguments on another tensor rank")
        return failure

    def _run_whole(
        self, unit: nn.Module, leaves: list[Any], before: State, generators: States
    ) -> tuple[Any, Exception | None]:
        """Run the unit with whole weights and copies of arguments, from its state before. Return its result, or None
        and its error."""
        args, kwargs = tree_unflatten(_copies(leaves), tree_flatten((self.args, self.kwargs))[1])
        restore(before)
        self._set_random_state(generators)
        try:
            with temporarily_whole(self.model, self.name, self.plan, self.ranks):
                start = state_of(unit, self._given)  # with whole weights
                out = self._run(unit, args, kwargs, together=False)
                self._sums += new_values(start, state_of(unit, self._given))
        except (RankError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as failure:
            return None, failure
        return out, None

    def _run(self, unit: nn.Module, args: Any, kwargs: Any, together: bool) -> Any:
        """Run the unit's own forward; `_sums` then contains the outputs of the linears behind its heads. together:
        before each collective operation, ranks exchange whether one of them has failed."""
        self._sums, hooks = [], []
        inside = f"{self.name}." if self.name else ""
        for name, role in self.plan.roles.items():
            if name.startswith(inside):
                module = self.model.get_submodule(name)
                if together:
                    hooks.append(module.register_forward_pre_hook(lambda *_: self._all_or_raise()))
                if role.kind in ("rows", "channels"):
                    hooks.append(
                        module.register_forward_hook(lambda *given: self._sums.append(given[-1].detach().clone()))
                    )
        try:
            return self.plain(unit, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _all_or_raise(self) -> None:
        if not self._all(True):
            raise _FailedElsewhere("on another rank")

    def _all(self, flag: bool) -> bool:
        return bool(self._on_all_ranks([flag])[0])

    def _on_all_ranks(self, flags: list[bool]) -> list[bool]:
        with without_modes(), torch.no_grad():
            gathered = self.ranks.all_reduce(torch.tensor([float(f) for f in flags], device=self.ranks.group.device))
            return [count == self.ranks.size for count in gathered.tolist()]

    def _is_right(self, unit: nn.Module, out: Any, twins: list[Any], before: State, generators: States) -> bool:
        sums = self._sums
        # Units may pass tensors of local heads to each other. If nothing else is right, these are gathered.
        for given in (lambda: twins, lambda: self._of_all_heads(twins)):
            expected, failure = self._run_whole(unit, given(), before, generators)
            if failure is not None:
                self.why = str(failure)
            if self._all(failure is None) and self._all(self._agree(expected, out, sums)):
                return True
        return False

    def _agree(self, expected: Any, out: Any, sums: list[torch.Tensor]) -> bool:
        pairs = list(zip(self._sums, sums, strict=False))
        wanted, got = tree_leaves(expected), tree_leaves(out)
        agree = len(self._sums) == len(sums) and len(wanted) == len(got)
        both = [(x, y) for x, y in zip(wanted, got, strict=False) if isinstance(x, torch.Tensor)]
        both = [(x, y) for x, y in both if isinstance(y, torch.Tensor)]
        per_head = [x.ndim == y.ndim == 4 and x.shape[1] != y.shape[1] and not self.attentions for x, y in both]
        # A rank may have all heads of one kind, and others none: all take part if one has other numbers of heads.
        alike = self._on_all_ranks([not flag for flag in per_head]) if both else []
        pairs += [(x, y if same else self._whole_of(y)) for (x, y), same in zip(both, alike, strict=True)]
        return agree and all(_close(x, y) for x, y in pairs)

    def _of_all_heads(self, leaves: list[Any]) -> list[Any]:
        """Return the arguments; gather those whose size at the head dimension is this rank's number of heads."""
        numbers = self.plan.attributes.get(self.name, {})
        heads = next((numbers[key][self.ranks.index] for key in HEAD_COUNTS if key in numbers), -1)
        flags = [isinstance(leaf, torch.Tensor) and leaf.ndim == 4 and leaf.shape[1] == heads for leaf in leaves]
        flags = self._on_all_ranks(flags) if flags else []
        return [self._whole_of(leaf) if flag else leaf for leaf, flag in zip(leaves, flags, strict=True)]

    def _random_state(self) -> States:
        return states(self.ranks.group.device, [])

    def _set_random_state(self, wanted: States) -> None:
        set_states(moved(self._random_state(), wanted), self.ranks.group.device, [])

    def _whole_of(self, part: torch.Tensor) -> torch.Tensor:
        size = torch.tensor([part.shape[1]], device=self.ranks.group.device)
        lengths = self.ranks.all_gather(size, [1] * self.ranks.size, 0).tolist()
        starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
        return gathered(part, shards(1, sum(lengths), [list(zip(starts, lengths, strict=True))]), self.ranks)


def _copies(leaves: list[Any]) -> list[Any]:
    """Copy tensors and stateful objects; identical objects stay identical."""
    made: dict[int, Any] = {}
    for leaf in leaves:
        if id(leaf) not in made:
            kept = _copy_of(leaf) if is_agent(leaf) else leaf
            made[id(leaf)] = leaf.detach().clone() if isinstance(leaf, torch.Tensor) else kept
    return [made[id(leaf)] for leaf in leaves]


def _copy_of(agent: Any) -> Any:
    """Return a deep copy of an object that shares its streams of a device: those of an offloaded cache, which cannot be
    copied."""
    return copy.deepcopy(agent, {id(one): one for one in vars(agent).values() if isinstance(one, torch.Stream)})


def is_agent(leaf: Any) -> bool:
    """Return whether an argument is an object in which a unit may store state, such as a cache of keys."""
    return hasattr(leaf, "__dict__") and not isinstance(leaf, (torch.Tensor, nn.Module, type)) and not callable(leaf)


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x, y) or torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.is_floating_point():
        return torch.equal(x, y)
    a, b = torch.nan_to_num(x.double()), torch.nan_to_num(y.double())
    return bool((a - b).norm() <= CLOSE.get(x.dtype, 4e-2) * a.norm())
