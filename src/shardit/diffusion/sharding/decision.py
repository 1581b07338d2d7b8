"""Comparison of the decisions of ranks on how something is sharded, before anything is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from shardit.core.comm.p2p import Comm
from shardit.core.placement.assignment import Cut
from shardit.core.runtime.digests import short_hash
from shardit.diffusion.sharding.layout import Layout
from shardit.errors import InputError
from shardit.parallel.tensor.plan import TensorPlan

T = TypeVar("T")


def decided_alike(
    ranks: Comm, what: str, decide: Callable[[], T], describe: Callable[[T], dict[str, str]] = lambda _: {}
) -> T:
    """Return the result of `decide`, which is the same on every rank. Collective, one small message.

    describe: the parts of the decision as text, by their names in messages. Raises InputError on
    all ranks where they differ, or where any of them refuses: a rank alone would leave the others waiting.
    """
    found, refusal, words = None, None, {}
    try:
        found = decide()
        words = describe(found)
    except InputError as error:
        refusal = error
    encoded = [repr(item).encode() for item in (str(refusal), *words.items())]
    if len(set(ranks.group.gather_bytes(short_hash(*encoded)))) > 1:
        everything = ranks.group.gather_objects((None if refusal is None else str(refusal), words))
        if refusal is None:
            raise InputError(_difference(what, everything))
    if refusal is not None:
        raise refusal
    return found  # pyright: ignore[reportReturnType]


def _difference(what: str, everything: list[tuple[str | None, dict[str, str]]]) -> str:
    """One line about what ranks have decided in different ways."""
    for rank, (refusal, _) in enumerate(everything):
        if refusal is not None:
            return f"rank {rank} refuses, others do not: {refusal}"
    decisions = [words for _, words in everything]
    names = dict.fromkeys(name for words in decisions for name in words)
    wrong = [name for name in names if len({words.get(name) for words in decisions}) > 1]
    return (
        f"ranks would shard {', '.join(wrong) or 'the components'} of {what} in different ways: give every rank the "
        "same components, in the same dtype, and the same arguments"
    )


def describe_layout(layout: Layout | None) -> dict[str, str]:
    """How each component of a pipeline is sharded."""
    if layout is None:
        return {}
    cuts, assignment = layout.cuts, layout.assignment
    kept = {name: sorted(tensors) for name, tensors in assignment.small.items()}
    by_name = (assignment.cut, assignment.layerwise, assignment.owned, assignment.tiles, assignment.held, kept)
    return {
        name: repr([found.get(name) for found in by_name]) + describe_slices(cuts.get(name)) for name in assignment.held
    }


def describe_blocks(decision: tuple[Mapping[str, TensorPlan], Cut | None]) -> dict[str, str]:
    """How the blocks of a model that is sharded by itself are sharded."""
    slices, cut = decision
    return {"the blocks": repr(cut) + "".join(map(describe_slices, slices.values()))}


def describe_slices(plan: TensorPlan | None) -> str:
    """How the tensors of a component are cut."""
    return repr(sorted(plan.cuts.items(), key=lambda cut: cut[0])) if plan is not None else ""
