"""Slices and owners of the components of a pipeline, decided in one place for checks, `inspect` and loading."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import Mesh
from shardit.core.modules.hints import Plan
from shardit.core.placement.assignment import Assignment, assign
from shardit.core.placement.slices import Owned
from shardit.diffusion.family import FAMILY
from shardit.diffusion.roles import roles_of
from shardit.parallel.tensor.apply import TensorPlan, owned_slices, owners_of_wholes, plan_components

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineLayout:
    """The slices of components that are split, by name, and the owners of blocks, encoders and VAEs."""

    cuts: dict[str, TensorPlan]
    assignment: Assignment

    def owned(self, modules: Iterable[str], member: int) -> dict[str, Owned]:
        """Return the parameters, by name, that a member of a replica holds of each of these components."""
        neighbour = member % self.assignment.tp
        return {n: owned_slices(self.assignment.owns(n, member), self.cuts.get(n), neighbour) for n in modules}


def lay_out(
    modules: Mapping[str, nn.Module],
    pipeline_class: type,
    config: DiffusionParallelConfig,
    *,
    max_in_flight: int = 1,
    plans: Plan | Mapping[str, Plan] | None = None,
    held: Sequence[float] | None = None,
) -> PipelineLayout:
    """Decide the slices and owners of components, from shapes alone. Keyword arguments are those of `assign`.

    Raises InputError and UnsupportedError if the configuration does not fit the pipeline.
    """
    roles = roles_of(modules, pipeline_class)
    cuts = plan_components(modules, roles, config.tensor_parallel_size, FAMILY, owners_of_wholes(config))
    assignment = assign(
        modules,
        roles,
        config,
        max_in_flight=max_in_flight,
        plans=plans,
        sliced=cuts.keys(),
        environ=os.environ,
        held=held,
    )
    return PipelineLayout(cuts, assignment.counted(modules))


def warn_unmet(unmet: Iterable[str], mesh: Mesh) -> None:
    """Log, once, on the first rank, the requests that cannot be met."""
    for note in unmet if mesh.rank == 0 else ():
        log.warning("%s", note)
