"""Pieces of tensors: parts of whole ones, copies, and other numbers of ranks than wrote them."""

from __future__ import annotations

import pytest
import torch

from shardit.core.placement.slices import Shards, even, shards
from shardit.training.run.tensor_pieces import own_part, place_of

WHOLE = torch.arange(48).view(4, 12)
CUTS = {
    "two": even(12, 2, dim=1),
    "five": even(12, 5, dim=1),
    "gates": shards(1, 12, [[(0, 3), (3, 3)], [(6, 3), (9, 3)]]),
    "copies": Shards(1, 12, (((0, 6),), ((0, 6),), ((6, 6), (6, 6)))),
    "rows": even(4, 3),
}


@pytest.mark.parametrize("before", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("after", [None, *CUTS.values()], ids=["whole", *CUTS])
def test_pieces_become_the_parts_of_another_cut(before: Shards, after: Shards | None) -> None:
    written = [(before.of(rank).take(WHOLE), place_of(before, rank)) for rank in range(len(before.ranks))]
    for rank in range(1 if after is None else len(after.ranks)):
        expected = WHOLE if after is None else after.of(rank).take(WHOLE)
        assert torch.equal(own_part(written, after, rank), expected)
        assert torch.equal(own_part([(WHOLE, None)], after, rank), expected)


def test_each_part_of_a_tensor_is_first_on_one_rank() -> None:
    for cut in CUTS.values():
        at = torch.arange(cut.total)
        found = []
        for rank in range(len(cut.ranks)):
            own = Shards(0, cut.total, cut.ranks).of(rank).take(at)
            found += [one for start, length in cut.first_runs(rank) for one in own[start : start + length].tolist()]
        assert sorted(found) == at.tolist()
    assert [cut.copied for cut in CUTS.values()] == [False, False, False, True, False]
