"""Which tensors derive from which: by the storages that operations read, make and write to."""

from __future__ import annotations

import torch

from shardit.core.runtime.storages import Origins


def test_sources_follow_operations_and_views() -> None:
    origins = Origins()
    first, second, other = torch.ones(4), torch.ones(4), torch.ones(4)
    origins.add(first, "a")
    origins.add(second, "b")
    total = first + second
    origins.derive([total], [first, second, other])
    assert origins.of([total[1:]]) == {"a", "b"}  # a view has the storage
    assert not origins.of([other])
    assert other not in origins  # asking remembers nothing


def test_a_write_adds_to_what_was_there() -> None:
    origins = Origins()
    kept, read, plain = torch.ones(4), torch.ones(4), torch.ones(4)
    origins.add(kept, "a")
    origins.add(read, "b")
    origins.derive([kept], [read])
    origins.derive([kept], [plain])  # part of the storage may still hold the old content
    assert origins.of([kept]) == {"a", "b"}
