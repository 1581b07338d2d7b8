"""Small lists of blocks, which may run whole on every rank: refiners of text, encoders of motion.

How small a list is shows at the end of a forward, when the multiplications of all block calls have been counted. Its
parameters do not tell: a refiner may see all tokens, and an encoder one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from shardit.parallel.sequence.found.search import NoShardingFound
from shardit.parallel.sequence.partitioned.run import PartitionedBlock

SMALL = 0.05
"""Share of the multiplications of all blocks in a forward up to which a list of blocks is small."""


@dataclass
class ListWork:
    """The multiplications of each list of blocks in one forward. doubtful: kinds of blocks that are partitioned only if
    their list is small, by their key, with the name of a block."""

    doubtful: dict[Any, tuple[str, PartitionedBlock]] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, multiplications: int) -> None:
        """Count a call of a block."""
        self._counts[name.rpartition(".")[0]] += multiplications

    def settled(self) -> list[tuple[str, PartitionedBlock]]:
        """Return the doubtful kinds, at the end of the forward. Raises the refusal of one whose list is not small."""
        for name, kind in self.doubtful.values():
            if kind.unless_small is not None and not self.is_small(name):
                raise kind.unless_small
        return list(self.doubtful.values())

    def is_small(self, name: str) -> bool:
        """Return whether the list of a block is small, as far as counted."""
        return self._counts[name.rpartition(".")[0]] <= SMALL * self._counts.total()


def only_if_small(partitioned: PartitionedBlock, refused: NoShardingFound) -> PartitionedBlock:
    """Return what is partitioned for a block that is refused unless its list is small."""
    kept = NoShardingFound(*refused.args)  # without the frames of its traceback, which hold tensors
    kept.may_partition = refused.may_partition
    return replace(partitioned, unless_small=kept)
