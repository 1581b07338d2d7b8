"""Reads the stacks of hanging ranks: finds those that wait for a peer, and the one that holds the others up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from shardit.core import comm

_COMMUNICATES = ("torch/distributed", str(Path(comm.__file__).parent))
"""Files of the innermost frames of a rank that waits for others."""


def suspect(stacks: Mapping[int, str], silent: Iterable[int]) -> int:
    """Return the rank that most likely holds the others up: one that is stopped, else one that does not wait for a
    peer."""
    ranks = sorted(silent)
    for rank in ranks:
        if not stacks.get(rank):
            return rank
    return next((rank for rank in ranks if not waits_for_peer(stacks[rank])), ranks[0])


def waits_for_peer(stack: str) -> bool:
    """Return whether a rank with this stack is in the middle of communication."""
    return any(place in line for line in frames(stack)[:3] for place in _COMMUNICATES)


def frames(stack: str) -> list[str]:
    """Return the frames of a rank's main thread, the innermost first; [] for a rank that did not react."""
    of_main = stack.rpartition("(most recent call first)")[2]  # the oldest thread comes last
    return [line.strip() for line in of_main.splitlines() if line.strip().startswith("File ")]


def described(stacks: Mapping[int, str]) -> str:
    """Return the innermost frame of each rank, in one line."""
    found = {rank: frames(stack) for rank, stack in stacks.items()}
    return "; ".join(f"rank {rank}: {(lines or ['it does not react'])[0]}" for rank, lines in found.items())
