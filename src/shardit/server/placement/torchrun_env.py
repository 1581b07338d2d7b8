"""A rank's place among those that torchrun has started, and what it tells the others of itself."""

from __future__ import annotations

import dataclasses
import os
import socket
from dataclasses import dataclass
from typing import Any

from shardit.engine.nodes.handshake import address_towards
from shardit.server.options import ServeOptions

LOOPBACK = ("127.0.0.1",)


@dataclass(frozen=True)
class Seat:
    """This rank's place among those that torchrun has started."""

    rank: int
    world_size: int
    local_size: int
    master: str
    restarts: int

    @classmethod
    def of_environment(cls) -> Seat:
        """As torchrun tells it."""
        size = int(os.environ["WORLD_SIZE"])
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            master=os.environ["MASTER_ADDR"],
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


def hosts_of(seat: Seat) -> tuple[str, ...]:
    """On rank 0: by which names ranks may reach this machine; LOOPBACK where all ranks are on it."""
    if seat.local_size == seat.world_size or seat.master in ("localhost", "::1") or seat.master.startswith("127."):
        return LOOPBACK
    # torchrun may name another machine than this one, and a machine's own name may lead to 127.0.1.1 on itself.
    towards = address_towards(seat.master, 1)
    own = [towards] if towards and not towards.startswith("127.") else []
    return tuple(dict.fromkeys([*own, seat.master, socket.gethostname()]))


def flags_of(options: ServeOptions) -> dict[str, Any]:
    """What must be the same on every node, by the names of flags."""
    shared = {name: getattr(options, name) for name in ("model", "dtype", "device", "attention_backend")}
    return {**shared, **dataclasses.asdict(options.loading), **dataclasses.asdict(options.config)}
