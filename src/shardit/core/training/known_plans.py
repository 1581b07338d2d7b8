"""The schedules of the losses that have been seen, by signature and by the contents of deciding tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardit.core.runtime.versions import value_bytes
from shardit.core.training.schedules import Schedules

MAX_CONTENTS = 1024
"""Number of remembered signatures and contents; the oldest is dropped first, and found again when it comes back."""


@dataclass
class KnownLossPlans:
    """schedules: by signature and contents. deciding: for each signature the leaves of the micro-batch whose values are
    read outside the blocks, such as masks."""

    schedules: dict[tuple[Any, bytes], Schedules] = field(default_factory=dict)
    deciding: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    def find(self, key: Any, leaves: Sequence[Any]) -> Schedules | None:
        """Return the schedules of a loss, or None if they are unknown."""
        return self.schedules.get((key, self._contents(key, leaves)))

    def of_signature(self, key: Any) -> list[Schedules]:
        """Return all schedules of a signature, the latest first."""
        return list({id(one): one for (of, _), one in reversed(self.schedules.items()) if of == key}.values())

    def learn(self, key: Any, leaves: Sequence[Any], deciding: Iterable[int], schedules: Schedules) -> None:
        """Store the schedules of a loss, and the leaves that it depends on."""
        before = self.deciding.get(key, ())
        self.deciding[key] = tuple(sorted({*before, *deciding}))
        if self.deciding[key] != before:  # the old entries are not keyed by the new leaves
            for old in [one for one in self.schedules if one[0] == key]:
                del self.schedules[old]
        self.schedules[key, self._contents(key, leaves)] = schedules
        if len(self.schedules) > MAX_CONTENTS:
            del self.schedules[next(iter(self.schedules))]

    def _contents(self, key: Any, leaves: Sequence[Any]) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for number in self.deciding.get(key, ()):
            digest.update(value_bytes(leaves[number]).cpu().numpy().tobytes())
        return digest.digest()
