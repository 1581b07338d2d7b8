"""Ranks started by torchrun, including this process: all of them run the same requests."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shardit.engine.process.memory import peak_bytes, reset_peak
from shardit.engine.process.messages import InputRejected, SessionSpec
from shardit.engine.rank.worker import open_session
from shardit.engine.tasks.task import OnProgress
from shardit.errors import InputError, RankError

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output
    from shardit.diffusion.request.model_info import ModelInfo


class JoinedRanks:
    """This process as one of the ranks started by torchrun."""

    def __init__(self, spec: SessionSpec):
        self.spec = spec
        self.info: ModelInfo | None = None
        self.rank = int(os.environ["RANK"])
        self._session: Any = None
        self._world: Any = None
        check_world_size(spec.config.world_size)

    def start(self) -> None:
        """Load this rank's share of the model."""
        from shardit.core.comm.group import GroupCoordinator

        with errors_with_rank(self.rank):
            self._session = open_session(
                self.spec, rank=self.rank, world_size=self.spec.config.world_size, init_method="env://"
            )
        self.info, self._world = self._session.info, GroupCoordinator.of_mesh(self._session.mesh)["world"]

    def generate(self, build: Callable[[], list[Any]], on_progress: OnProgress) -> list[Output]:
        """Run the requests that `build` returns on rank 0, which draws seeds and reads images, on all ranks. A rank
        waits for another one as long as for any message."""
        with errors_with_rank(self.rank):
            requests = self._world.broadcast_object(made_or_error(build) if self.rank == 0 else None)
            if isinstance(requests, (InputError, RankError)):
                raise requests
            reset_peak()
            outputs = self._session.generate(requests, on_progress if self.rank == 0 else ignore_progress)
            peaks, replicas = self._world.gather_objects(peak_bytes()), self._world.gather_on_first(outputs)
            found = {index: output for one in replicas for index, output in one.items()}
            return [dataclasses.replace(found[index], peak_bytes=peaks) for index in sorted(found)]

    def close(self) -> None:
        """Leave the process group."""
        session, self._session = self._session, None
        if session is not None:
            session.close()


def check_world_size(wanted: int) -> None:
    """Raise InputError if torchrun has started another number of ranks."""
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != wanted:
        raise InputError(
            f"torchrun has started {world_size} ranks, but parallel_config needs {wanted}; "
            f"use --nproc-per-node {wanted} or change the parallel sizes"
        )


@contextlib.contextmanager
def errors_with_rank(rank: int) -> Iterator[None]:
    """Raise RankError, which names this rank, for errors of other kinds."""
    try:
        yield
    except (InputError, RankError):
        raise
    except Exception as error:
        raise RankError(rank, f"{type(error).__name__}: {error}") from error


def ignore_progress(index: int, step: int, total: int, made: Any = None) -> None:
    """Ignore progress, on all ranks but the first."""


def made_or_error(build: Callable[[], list[Any]]) -> list[Any] | InputError | RankError:
    """Build the requests, or return the error for all ranks: they would wait for the first one."""
    try:
        return build()
    except InputError as error:
        return InputRejected.from_error(error).error()
    except Exception as error:
        return RankError(0, f"{type(error).__name__}: {error}")
