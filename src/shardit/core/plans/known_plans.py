"""Caches the plans of one transformer by signature, and by the values of arguments on which the forward depends."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardit.core.plans.local_plan import LocalPlan
from shardit.core.runtime.versions import value_bytes

MAX_SIGNATURES = 64
"""Number of plans kept per transformer; the least recently used one is dropped first."""

MAX_CONTENTS = 1024
"""Number of remembered contents of deciding arguments; a plan beyond that is found again, without a first call."""


@dataclass
class KnownPlans:
    """All plans, the least recently used one first.

    plans: by signature and digest. deciding: for each signature, the argument leaves whose values are read outside the
    blocks. found: the digest for a signature and the contents of those leaves.
    """

    plans: OrderedDict[tuple[Any, str], LocalPlan] = field(default_factory=OrderedDict)
    deciding: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    found: OrderedDict[tuple[Any, bytes], str] = field(default_factory=OrderedDict)

    def find(self, key: Any, leaves: Sequence[Any]) -> LocalPlan | None:
        """Return the plan of a call with these leaves, or None if it is unknown."""
        if key not in self.deciding:
            return None
        where = key, self._contents(key, leaves)
        plan = self.plans.get((key, self.found.get(where, "")))
        if plan is not None:
            self.found.move_to_end(where)
            self.plans.move_to_end((key, self.found[where]))
        return plan

    def of_signature(self, key: Any) -> list[LocalPlan]:
        """Return the plans of earlier calls with a signature, the latest first."""
        return [plan for (of, _), plan in reversed(self.plans.items()) if of == key]

    def learn(self, key: Any, leaves: Sequence[Any], deciding: Iterable[int], plan: LocalPlan) -> None:
        """Store the plan of a call and the argument leaves that it depends on. No trace shows which floats are read, so
        all of them count."""
        before, digest = self.deciding.get(key, ()), plan.plan.digest()
        floats = (number for number, leaf in enumerate(leaves) if isinstance(leaf, float))
        self.deciding[key] = tuple(sorted({*before, *deciding, *floats}))
        if self.deciding[key] != before:  # the old entries are not keyed by the new leaves
            for where in [where for where in self.found if where[0] == key]:
                del self.found[where]
        self.found[key, self._contents(key, leaves)] = digest
        self.plans.setdefault((key, digest), plan)
        self.plans.move_to_end((key, digest))
        if len(self.found) > MAX_CONTENTS:
            self.found.popitem(last=False)
        if len(self.plans) > MAX_SIGNATURES:
            (key, _), _ = self.plans.popitem(last=False)
            if not self.of_signature(key):
                del self.deciding[key]

    def _contents(self, key: Any, leaves: Sequence[Any]) -> bytes:
        if not self.deciding[key]:
            return b""
        digest = hashlib.blake2b(digest_size=16)
        for q in self.deciding[key]:
            leaf = leaves[q]
            tensor = leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=torch.float64)
            digest.update(value_bytes(tensor).cpu().numpy().tobytes())
        return digest.digest()
