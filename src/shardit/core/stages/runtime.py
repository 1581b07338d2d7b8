"""The state that all parallel modules of one pipeline share, and the calls of pipelines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from shardit.core.comm.agreement import Agreement, Caller
from shardit.core.comm.mesh import Mesh
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.program import Flight
from shardit.core.runtime.request_loop import RequestLoop, Schedule
from shardit.core.stages.guidance import GuidanceScheduler
from shardit.core.stages.result import Route
from shardit.errors import InputError


@dataclass
class Runtime:
    """State of one pipeline that its parallel modules share: the mesh, its messages, the schedule and the request loop.

    comm joins the stages of this rank's chain, `replica` all ranks that work on the same requests, `peers` those of
    them with this rank's slices. has_user_code: whether user code runs between model calls in a pipeline. models: for
    each model, the function that checks for changes and the function that accepts its present state.
    """

    mesh: Mesh
    comm: Comm
    replica: Comm
    peers: Comm
    route: Route
    guidance: GuidanceScheduler
    schedule: Schedule
    loop: RequestLoop
    agreement: Agreement
    max_in_flight: int = 1
    split_batch: bool = True
    has_user_code: bool = False
    models: list[tuple[Callable[[], Any], Callable[[], None]]] = field(default_factory=list)
    _thread: Any = field(default_factory=RLock, repr=False)

    @staticmethod
    def of(mesh: Mesh, max_in_flight: int = 1, split_batch: bool = True) -> Runtime:
        """Make the shared state of a pipeline over a mesh."""
        schedule = Schedule(mesh.pp_rank)
        comms = {id(groups): Comm(groups) for groups in (mesh.pipeline, mesh.replica, mesh.peers)}
        comm, replica, peers = (comms[id(groups)] for groups in (mesh.pipeline, mesh.replica, mesh.peers))
        guidance = GuidanceScheduler(mesh.sizes["cfg"], mesh.coords["cfg"], mesh.rank)
        route, loop = Route.of(mesh, replica), RequestLoop(schedule)
        alike = Agreement(replica)
        return Runtime(mesh, comm, replica, peers, route, guidance, schedule, loop, alike, max_in_flight, split_batch)

    @property
    def program(self) -> object:
        """The caller: the request that has its turn, or one object for all use of the model without requests."""
        return self.loop.current or self.loop

    @contextmanager
    def pipeline_call(self, name: str, arguments: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """Enclose a call of a pipeline, which all ranks of the replica make alike. It is compared here unless it is a
        request, which the session compares. Raises InputError as `Agreement.call` does."""
        with self.turn():
            self.guidance.begin(self.program)
            alone = nullcontext() if self.loop.current is not None else self.agreement.call(name, arguments)
            with alone:
                yield

    @contextmanager
    def turn(self) -> Iterator[Caller | None]:
        """Enclose a call in which other ranks take part, of a pipeline or of a part; gives the caller, None for a
        request. Raises InputError if another thread makes such a call: ranks would meet their messages in other
        orders."""
        if not self._thread.acquire(blocking=False):
            raise InputError(
                "another thread makes a call over the same ranks: make them one after the other, or let Omni or LLM "
                "run several requests at once"
            )
        try:
            yield None if self.loop.current is not None else self.agreement.caller()
        finally:
            self._thread.release()

    @property
    def in_pipeline(self) -> bool:
        """Whether a pipeline is being called."""
        return self.loop.current is not None or self.agreement.depth > 0

    @property
    def watches(self) -> bool:
        """Whether code of users may run between two calls of models."""
        return self.has_user_code or not self.in_pipeline

    def mark_start(self, name: str, arguments: Callable[[], Mapping[str, Any]]) -> None:
        """Compare what the first call of a model in a call of a pipeline is given; later calls are not looked at."""
        if self.loop.current is not None:
            self.loop.mark_start(arguments)
        else:
            self.agreement.mark(name, arguments)

    def defer(self, name: str, failure: BaseException | None) -> bool:
        """Note that the model called `name` failed on this rank alone. Return whether the call of the pipeline is one
        that raises it at its end, on all ranks; requests end with their ranks."""
        if self.loop.current is not None or not isinstance(failure, Exception):
            return False
        return self.agreement.defer(name, failure)

    def wait_for(self, flight: Flight) -> None:
        """Return when `flight` is virtually done. If code of users has run since it began, models are inspected: a
        change is for later calls."""
        watched = self.models if self.watches and not flight.finished else ()
        for look, _ in watched:
            look()
        self.guidance.waits(self.program)
        self.loop.wait_for(flight)
        for _, take in watched:
            take()

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        self.schedule.drain()
        self.comm.flush()
        self.replica.flush()
        self.peers.flush()
