"""The process of a rank: loads its share of the model and runs the requests that it receives."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import traceback
from typing import Any

from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.messages import Failed, InputRejected, Ready, SessionSpec
from shardit.engine.process.process import set_threads
from shardit.errors import InputError, RankError
from shardit.loading.missing_packages import missing_package

# Messages of gloo, NCCL and their stores about the failure of another rank; some are plain RuntimeErrors.
_OF_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "socket closed",
    "timed out waiting",
    "timeout waiting",
    "wait timeout",
    "watchdog caught collective",
    "nccl communicator was aborted",
    "remote process exited",
    "failed to recv",
    "application timeout caused pair closure",
)

# Texts of `RankError` for errors that ranks found together, which blame no rank in particular.
_OF_ALL = ("communication failed", "ranks disagree on the outcome")


def main(
    spec: SessionSpec, rank: int, world_size: int, rendezvous: str, threads: int, channel: Channel, where: str = ""
) -> int:
    """Run one rank until the user's process closes its channel; returns the exit code. `where` is put before the text
    of a rejection, which may apply to one machine only."""
    try:
        set_threads(threads)
        if spec.of_server:
            log_as_server(rank)
        try:
            session = open_session(spec, rank=rank, world_size=world_size, init_method=rendezvous)
        except ImportError as error:
            raise missing_package(error) from error
        channel.send(Ready(session.info))
        session.serve(channel)
    except InputError as error:
        rejected = InputRejected.from_error(error)
        channel.send(dataclasses.replace(rejected, text=where + rejected.text))
        return 0
    except Closed:
        return 0
    except BaseException as error:
        with contextlib.suppress(Closed):
            channel.send(Failed(describe(error), blames_peer(error)))
        return 1
    session.close()
    return 0


def log_as_server(rank: int) -> None:
    """Send log messages of libraries during loading to the log of the server."""
    import transformers.utils.logging  # noqa: F401  both set up their loggers now

    from shardit.logs import logger, take_over

    take_over(logger("rank").bind(rank=rank))


def open_session(spec: SessionSpec, *, rank: int, world_size: int, init_method: str) -> Any:
    """Create the session class named by `spec.session`."""
    module, _, name = spec.session.partition(":")
    session_class = getattr(importlib.import_module(module), name)
    return session_class(spec, rank=rank, world_size=world_size, init_method=init_method)


def describe(error: BaseException) -> str:
    """Return the error in one line, then its traceback."""
    summary = traceback.format_exception_only(type(error), error)[-1].strip()
    return summary + "\n" + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()


def blames_peer(error: BaseException) -> bool:
    """Return whether the failure of another rank, not of this rank, is the cause."""
    # The first of a chain of exceptions decides: cleaning up after a rank's own error may fail on a peer.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    root = chain[-1]
    if any(isinstance(one, RankError) and any(words in one.reason for words in _OF_ALL) for one in chain[-2:]):
        return True
    if isinstance(root, RuntimeError) and type(root).__module__.startswith("torch"):
        return "Dist" in type(root).__name__
    return any(phrase in str(root).lower() for phrase in _OF_PEER)
