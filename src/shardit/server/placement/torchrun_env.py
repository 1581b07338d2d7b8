"""Rank, world size and addresses from torchrun's environment."""

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
class RankEnv:
    """The place of this rank among the ranks of torchrun."""

    rank: int
    world_size: int
    local_size: int
    master: str
    restarts: int

    @classmethod
    def of_environment(cls) -> RankEnv:
        """Read the environment of torchrun."""
        size = int(os.environ["WORLD_SIZE"])
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            master=os.environ["MASTER_ADDR"],
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )


def hosts_of(rank_env: RankEnv) -> tuple[str, ...]:
    """On rank 0: return the host names at which ranks may reach this machine; LOOPBACK if all ranks are on it."""
    if (
        rank_env.local_size == rank_env.world_size
        or rank_env.master in ("localhost", "::1")
        or rank_env.master.startswith("127.")
    ):
        return LOOPBACK
    # torchrun may name another machine than this one, and a machine's own name may resolve to 127.0.1.1 on itself.
    towards = address_towards(rank_env.master, 1)
    own = [towards] if towards and not towards.startswith("127.") else []
    return tuple(dict.fromkeys([*own, rank_env.master, socket.gethostname()]))


def flags_of(options: ServeOptions) -> dict[str, Any]:
    """Return the options that must be the same on every node, by the names of flags."""
    shared = {name: getattr(options, name) for name in ("model", "dtype", "device", "attention_backend")}
    return {**shared, **dataclasses.asdict(options.loading), **dataclasses.asdict(options.config)}
