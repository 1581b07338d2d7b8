"""A barrier that checks that all ranks reached the same point, so that none waits for a message that never comes."""

from __future__ import annotations

import pickle
from typing import Any

from shardit.core.comm.p2p import Comm


class RemoteError(Exception):
    """Stands for an exception of another rank that cannot be sent as it is."""


def checked_barrier(comm: Comm, here: str | Exception) -> str | None:
    """Wait until all ranks have reached a point, or failed. Returns None if all are at the same point, or all have
    failed (each then raises its own error); else the difference, the same text on every rank."""
    reached = comm.group.gather_objects(sendable(here) if isinstance(here, Exception) else here)
    errors = {rank: value for rank, value in enumerate(reached) if isinstance(value, Exception)}
    if len(errors) == comm.size:
        return None
    if errors:
        rank, error = next(iter(errors.items()))
        return f"rank {rank} fails and others do not ({type(error).__name__}: {error})"
    return f"they are at {reached}" if len(set(reached)) > 1 else None


def sendable(error: Exception) -> Exception:
    """Return an exception that other ranks receive as one of the same class, with the same text and attributes; a
    RemoteError with its name and text if it cannot be sent so. The result is for pickling, not for raising."""
    for sent in (error, _Rebuilt(error)):
        try:
            received = pickle.loads(pickle.dumps(sent))
            if type(received) is type(error) and str(received) == str(error):
                return sent
        except Exception:  # an exception of unknown class may raise anything when it is pickled
            continue
    return RemoteError(f"{type(error).__name__}: {error}")


class _Rebuilt(Exception):
    """Pickled as another exception, which is restored without its `__init__`: that may take other arguments than
    `args`."""

    def __init__(self, error: Exception):
        super().__init__(*error.args)
        self.error = error

    def __str__(self) -> str:
        return str(self.error)

    def __reduce__(self) -> Any:
        return _rebuild, (type(self.error), self.error.args, vars(self.error))


def _rebuild(cls: type[Exception], args: tuple[Any, ...], attributes: dict[str, Any]) -> Exception:
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(attributes)
    return error
