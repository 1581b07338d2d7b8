"""A barrier that checks that all ranks reached the same point, so that none waits for a message that never comes."""

from __future__ import annotations

import pickle

from shardit.core.comm.p2p import Comm


class RemoteError(Exception):
    """Stands for an exception of another rank that cannot be pickled."""


def checked_barrier(comm: Comm, here: str | Exception) -> str | None:
    """Wait until all ranks have reached a point, or failed. Returns None if all are at the same point, or all have
    failed (each then raises its own error); else the difference, the same text on every rank."""
    reached = comm.group.gather_objects(sendable(here) if isinstance(here, Exception) else here)
    errors = {rank: value for rank, value in enumerate(reached) if isinstance(value, Exception)}
    if len(errors) == comm.size:
        return None
    if errors:
        rank, error = next(iter(errors.items()))
        return f"rank {rank} fails where others do not ({type(error).__name__}: {error})"
    return f"they are at {reached}" if len(set(reached)) > 1 else None


def sendable(error: Exception) -> Exception:
    """Return the exception itself if it can be pickled, else a RemoteError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of unknown class may raise anything when it is pickled
        return RemoteError(f"{type(error).__name__}: {error}")
    return error
