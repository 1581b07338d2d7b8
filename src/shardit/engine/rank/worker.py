"""A rank: it loads its share of the model and runs the requests that it receives or (under torchrun) makes itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.memory import peak_bytes, reset_peak
from shardit.engine.process.messages import Failed, Ready, Refused, SessionSpec
from shardit.engine.process.process import set_threads
from shardit.errors import InputError, RankError
from shardit.loading.missing import missing_package

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output
    from shardit.diffusion.request.model_info import ModelInfo

# How gloo, NCCL and their stores speak of another rank's end; they raise plain RuntimeErrors in places.
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

# What `RankError` says where ranks found out together that something is wrong, which tells of no rank in particular.
_OF_ALL = ("communication failed", "differ between ranks", "ended a request differently")


def main(
    spec: SessionSpec, rank: int, world_size: int, rendezvous: str, threads: int, channel: Channel, where: str = ""
) -> int:
    """Run one rank until the user's process closes its channel; returns the exit code. `where` goes before the text
    of a refusal, which may be true on one machine only."""
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
        refused = Refused.from_error(error)
        channel.send(dataclasses.replace(refused, text=where + refused.text))
        return 0
    except Closed:
        return 0
    except BaseException as error:
        with contextlib.suppress(Closed):
            channel.send(Failed(describe(error), speaks_of_peer(error)))
        return 1
    session.close()
    return 0


def log_as_server(rank: int) -> None:
    """What libraries say while the model is loaded belongs into the log of the server."""
    import transformers.utils.logging  # noqa: F401  both set up their loggers now

    from shardit.logs import logger, take_over

    take_over(logger("rank").bind(rank=rank))


class JoinedRanks:
    """This process is one of the ranks that torchrun has started."""

    def __init__(self, spec: SessionSpec):
        self.spec = spec
        self.info: ModelInfo | None = None
        self.rank = int(os.environ["RANK"])
        self._session: Any = None
        world_size, wanted = int(os.environ["WORLD_SIZE"]), spec.config.world_size
        if world_size != wanted:
            raise InputError(
                f"torchrun has started {world_size} ranks, but parallel_config needs {wanted}; "
                f"use --nproc-per-node {wanted} or change the parallel sizes"
            )

    def start(self) -> None:
        """Load this rank's share of the model."""
        with self._naming_this_rank():
            self._session = open_session(
                self.spec, rank=self.rank, world_size=self.spec.config.world_size, init_method="env://"
            )
        self.info = self._session.info

    def generate(self, build: Callable[[], list[Any]], on_progress: Callable[[int, int, int], None]) -> list[Output]:
        """Run the requests that `build` makes on rank 0, which draws seeds and reads pictures, on all ranks."""
        with self._naming_this_rank():
            requests = from_rank_0(lambda: made_or_error(build))
            if isinstance(requests, InputError):
                raise requests
            reset_peak()
            outputs = self._session.generate(requests, on_progress if self.rank == 0 else ignore_progress)
            return with_peaks(in_order(collected(outputs)), gather(peak_bytes()))

    def close(self) -> None:
        """Leave."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @contextlib.contextmanager
    def _naming_this_rank(self) -> Iterator[None]:
        try:
            yield
        except (InputError, RankError):
            raise
        except Exception as error:
            raise RankError(self.rank, f"{type(error).__name__}: {error}") from error


def open_session(spec: SessionSpec, *, rank: int, world_size: int, init_method: str) -> Any:
    """Make the session that `spec.session` names."""
    module, _, name = spec.session.partition(":")
    session_class = getattr(importlib.import_module(module), name)
    return session_class(spec, rank=rank, world_size=world_size, init_method=init_method)


def ignore_progress(index: int, step: int, total: int) -> None:
    """The progress callback of all other ranks."""


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in the order of ranks."""
    import torch.distributed as dist

    if not dist.is_initialized():  # one rank needs no group
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def collected(outputs: dict[int, Output]) -> dict[int, Output]:
    """The outputs of all replicas on rank 0, none on the others. Collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return outputs
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(outputs, boxes if dist.get_rank() == 0 else None)
    return {index: output for box in boxes if box for index, output in box.items()}


def in_order(outputs: dict[int, Output]) -> list[Output]:
    """The outputs of all requests, in the order of the requests."""
    return [outputs[index] for index in sorted(outputs)]


def made_or_error(build: Callable[[], list[Any]]) -> list[Any] | InputError:
    """The requests, or why there are none, for all ranks to know."""
    try:
        return build()
    except InputError as error:
        return Refused.from_error(error).error()


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What rank 0 makes; where ranks have no group, each makes its own."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return make()
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def describe(error: BaseException) -> str:
    """The error in one line, then its traceback."""
    summary = traceback.format_exception_only(type(error), error)[-1].strip()
    return summary + "\n" + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()


def speaks_of_peer(error: BaseException) -> bool:
    """Whether another rank's end, not this rank, is the cause."""
    # The first of a chain of exceptions tells: cleaning up after one's own error may fail on a peer.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    root = chain[-1]
    if any(isinstance(one, RankError) and any(words in one.reason for words in _OF_ALL) for one in chain[-2:]):
        return True
    if isinstance(root, RuntimeError) and type(root).__module__.startswith("torch"):
        return "Dist" in type(root).__name__
    return any(phrase in str(root).lower() for phrase in _OF_PEER)


def with_peaks(outputs: list[Output], peaks: list[int]) -> list[Output]:
    """The outputs with the peak memory of each rank filled in."""
    return [dataclasses.replace(output, peak_bytes=peaks) for output in outputs]
