"""Process groups of other libraries without further threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Let `torch.distributed.new_group` return the default group for all ranks, and one group for each other set.

    Each group of gloo has threads that wake up a hundred times a second, and libraries make groups for axes that have
    one rank here. They would slow down all that is measured.
    """
    import torch.distributed as dist

    made = functools.partial(_group, dist.new_group)
    with mock.patch.object(dist, "new_group", lambda ranks, *_, **__: made(tuple(ranks))):
        yield


@functools.cache
def _group(new_group: Any, ranks: tuple[int, ...]) -> Any:
    import torch.distributed as dist

    return dist.group.WORLD if len(ranks) == dist.get_world_size() else new_group(list(ranks))
