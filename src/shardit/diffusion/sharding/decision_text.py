"""The sharding decisions of a rank as text, to compare them among ranks."""

from __future__ import annotations

from collections.abc import Mapping

from shardit.core.placement.assignment import Cut
from shardit.diffusion.sharding.layout import PipelineLayout
from shardit.parallel.tensor.plan import TensorPlan, describe_slices


def describe_layout(layout: PipelineLayout | None) -> dict[str, str]:
    """Describe the sharding of each component of a pipeline."""
    if layout is None:
        return {}
    cuts, assignment = layout.cuts, layout.assignment
    kept = {name: sorted(tensors) for name, tensors in assignment.small.items()}
    by_name = (assignment.cut, assignment.layerwise, assignment.owned, assignment.tiles, assignment.held, kept)
    return {
        name: repr([found.get(name) for found in by_name]) + describe_slices(cuts.get(name)) for name in assignment.held
    }


def describe_blocks(decision: tuple[Mapping[str, TensorPlan], Cut | None]) -> dict[str, str]:
    """Describe the sharding of the blocks of a model outside a pipeline."""
    slices, cut = decision
    return {"the blocks": repr(cut) + "".join(map(describe_slices, slices.values()))}
