"""Ranks that meet: they say where they are, so that none waits for what another will never send."""

from __future__ import annotations

import pickle

from shardit.core.comm.p2p import Comm


class RemoteError(Exception):
    """An exception that was raised on another rank, where it cannot be sent as it is."""


def meet(comm: Comm, here: str | Exception) -> str | None:
    """Wait until all ranks have come to a place, or failed. None where all are at the same place, or all have failed
    (each then raises its own error); else how they differ, the same text on every rank."""
    reached = comm.group.gather_objects(sendable(here) if isinstance(here, Exception) else here)
    errors = {rank: value for rank, value in enumerate(reached) if isinstance(value, Exception)}
    if len(errors) == comm.size:
        return None
    if errors:
        rank, error = next(iter(errors.items()))
        return f"rank {rank} fails where others do not ({type(error).__name__}: {error})"
    return f"they are at {reached}" if len(set(reached)) > 1 else None


def sendable(error: Exception) -> Exception:
    """The exception itself if it survives pickling, else a RemoteError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of unknown class does when it is pickled
        return RemoteError(f"{type(error).__name__}: {error}")
    return error
