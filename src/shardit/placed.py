"""What a component is spread as: noted on the component, for pipelines that share it and for what is changed later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import DiffusionParallelConfig
from .core.assign import Assignment
from .core.plan import Plan
from .core.randomness import dropout_in_training
from .core.sites import swap_class
from .core.stages import Runtime
from .errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from .parallel.tensor_cuts import TensorPlan


@dataclass(eq=False)
class Placed:
    """One component that is spread.

    name: in the pipeline with which it was spread. runs_whole: each call of it is made by one rank, or by one rank for
    each of its units, of whole tensors. assignment: None for a model that was spread by itself. slices: how its linears
    are cut over tensor ranks.
    """

    name: str
    module: nn.Module
    config: DiffusionParallelConfig
    runtime: Runtime
    runs_whole: bool
    plan: Plan | None = None
    assignment: Assignment | None = None
    slices: TensorPlan | None = None
    _modules: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        swap_class(self.module, {"shardit_placed": property(lambda module: self)})

    def check(self) -> None:
        """Raise UnsupportedError, on every rank alike, for what has become of the component and cannot be right."""
        if not self.runs_whole and any(map(_training, self.module.modules())):
            self._refuse_dropout()

    def _refuse_dropout(self) -> None:
        part = dropout_in_training(self.module)
        if part is not None:
            raise UnsupportedError(
                f"{self.name or type(self.module).__name__} is in training mode, and {part} would drop other values on "
                "each rank: call .eval() on it"
            )

    def bytes_of(self, member: int) -> float:
        """About how many bytes a member of a replica holds of it."""
        if self.assignment is None:
            return 0.0
        owns = self.assignment.owns(self.name, member)
        share = self.assignment.tp if self.slices is not None else 1
        return sum(p.nbytes for name, p in self.module.named_parameters() if owns(name)) / share


def _training(module: nn.Module) -> bool:
    return module.training


def placed_on(module: Any) -> Placed | None:
    """How a module is spread; None where it is not."""
    return getattr(module, "shardit_placed", None) if isinstance(module, nn.Module) else None


def placed_among(
    modules: Mapping[str, nn.Module], config: DiffusionParallelConfig, plans: Plan | Mapping[str, Plan] | None
) -> dict[str, Placed]:
    """Those of the modules that are spread already. Raises InputError where that was done in another way than it is
    asked for now, or where they come from pipelines that were spread without sharing anything."""
    found = {name: placed for name, module in modules.items() if (placed := placed_on(module)) is not None}
    for name, placed in found.items():
        what = name or type(placed.module).__name__
        if placed.config != config:
            raise InputError(
                f"{what} is spread already, with {_differences(placed.config, config)}: use the same configuration for "
                "all pipelines that share it, or load it again"
            )
        plan = plans if isinstance(plans, Plan) or plans is None else plans.get(name)
        if plan is not None and plan != placed.plan:
            raise InputError(f"{what} is spread already, with {placed.plan}: leave out the plan, or load it again")
    runtimes = {id(placed.runtime): name for name, placed in found.items()}
    if len(runtimes) > 1:
        first, second, *_ = runtimes.values()
        raise InputError(
            f"{first} and {second} were spread as parts of different pipelines, which take turns of their own: make "
            "the pipelines that share components before parallelize, or load the components again"
        )
    return found


def _differences(one: DiffusionParallelConfig, other: DiffusionParallelConfig) -> str:
    pairs = {name: (value, getattr(other, name)) for name, value in vars(one).items()}
    return ", ".join(f"{name}={was!r} (now {now!r})" for name, (was, now) in pairs.items() if was != now)
