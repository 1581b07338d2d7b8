"""How ranks under torchrun learn where the supervisor is: rank 0 writes it into torch.distributed's store.

torchrun may keep one store over all its restarts, with what earlier ranks wrote. So what a rank reads may be out of
date: it is tried, and read again. For the same reason ranks do not meet over this store (see `engine.connect.Join`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..engine.connect import Reach
from ..errors import RankError

if TYPE_CHECKING:
    from ..engine.remote_rank import RemoteRank

KEY = "shardit/supervisor"
STORE_WAIT_S = 600.0
"""Longest wait for rank 0 to write, in seconds."""
TRY_S = 2.0

_kept: list[Any] = []  # without torchrun's own store rank 0 is its server, until the process ends


def tell(reach: Reach) -> None:
    """On rank 0: write down where the supervisor is."""
    _store().set(KEY, json.dumps(dataclasses.asdict(reach)))


def found(rank: RemoteRank) -> Reach:
    """On other ranks: have `rank` arrive at the supervisor that the store names. Raises RankError."""
    store, deadline = _store(), time.monotonic() + STORE_WAIT_S
    while True:
        try:
            said = json.loads(store.get(KEY))
        except RuntimeError as error:  # its server is gone, or nobody has written
            text = str(error).splitlines()[0]
            raise RankError(rank.rank, f"rank 0 has not said where the supervisor is ({text})") from None
        reach = Reach(tuple(said["hosts"]), said["port"], said["token"])
        try:
            rank.arrive(reach, TRY_S)
            return reach
        except RankError:
            if time.monotonic() > deadline:
                raise


def _store() -> Any:
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=STORE_WAIT_S)))
    _kept.append(store)
    return store
