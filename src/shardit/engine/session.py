"""One rank's session: its share of a model, and the requests that it runs together with all other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from shardit.core.comm.agreement import checksum
from shardit.core.comm.mesh import init_mesh
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.program import Program
from shardit.core.runtime.randomness import states
from shardit.core.runtime.request_loop import RequestLoop, Schedule
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.rank.batches import run_batches
from shardit.engine.rank.serving import ServingWorker
from shardit.engine.tasks.task import OnProgress, task_of
from shardit.errors import RankError
from shardit.logs import take_over
from shardit.parallel_state import destroy_model_parallel

if TYPE_CHECKING:
    from shardit.engine.process.messages import SessionSpec


def check(spec: SessionSpec) -> None:
    """Find mistakes before ranks start. Raises InputError. Reads no weights."""
    task_of(spec).check(spec)


class Session:
    """A loaded model on one rank. All methods are collective over the ranks.

    info: facts about the model for the user's process, as picklable data.
    """

    def __init__(self, spec: SessionSpec, *, rank: int, world_size: int, init_method: str):
        self.spec = spec
        self.mesh = init_mesh(
            spec.config, device=spec.device, timeout_s=spec.timeout_s, rank=rank, init_method=init_method
        )
        self.model = task_of(spec).load(spec, self.mesh)
        self.runtime = self.model.runtime
        self.loop = self.runtime.loop if self.runtime else RequestLoop(Schedule(0))
        self.info = self.model.info

    def serve(self, channel: Channel) -> None:
        """Run the requests that arrive at a channel until it is closed."""
        worker = ServingWorker(self, channel)
        if self.spec.of_server:
            take_over(worker.log, worker.current_request)
        try:
            for program in self.loop.rounds(worker.admit):
                worker.finish(program)
        except Closed:
            pass
        except Exception as error:
            worker.report(error)
            raise

    def generate(self, requests: list[Any], on_progress: OnProgress) -> dict[int, Any]:
        """Run requests that all ranks have, several at once, without a supervising process (torchrun). The outputs of a
        replica of the data axis, by the number of the request, are on its first rank; the others get {}.

        A mistake in a request ends that request alone. Raises RankError if ranks disagree.
        """
        if self.model.batcher is not None:
            return run_batches(self, self.model.batcher, requests, on_progress)
        outputs: dict[int, Any] = {}
        programs = {}
        starts: list[tuple[int, str | None]] = []

        def make() -> Iterator[Program]:
            replicas = self.mesh.sizes["dp"]
            for position in range(self.mesh.coords["dp"], len(requests), replicas):
                program = self.program(requests[position], on_progress)
                programs[program] = position
                yield program

        for program in self.loop.run(make(), self.spec.max_in_flight):
            position = programs.pop(program)
            request, error = requests[position], None
            if program.error is not None:
                error = self.model.error_text(request, program.error)
                self.agree((position, type(program.error).__name__), f"here: {program.error!r}")
            starts.append((position, program.start))
            if self.leads:
                outputs[position] = self.model.collect(request, program.value, error)
        self.agree(starts, "the first latents or the order of the requests")
        if self.runtime is not None:
            self.runtime.flush()
        return outputs

    def program(self, request: Any, on_progress: OnProgress) -> Program:
        """Make a program for the request loop from a request."""
        return Program(self._function(request, on_progress), request.seed)

    def _function(self, request: Any, on_progress: OnProgress) -> Callable[[], Any]:
        def run() -> tuple[Any, float, list[str]]:
            start = time.perf_counter()
            mine = self.loop.current
            with self.model.opened(request, on_progress, lambda: self.loop.current is mine) as (call, notes):
                out = call()
            if self.runtime is not None:
                self.runtime.agreement.refuse_draws()
            if mine is not None:  # compared between ranks: a model may draw random numbers on one of them only
                mine.start = f"{mine.start}, generators {checksum(states(self.mesh.device, []))}"
            return out, time.perf_counter() - start, notes

        return run

    def agree(self, value: Any, what: str) -> None:
        """Compare a value that must be the same on all ranks; raise RankError if it differs, as the group is then
        unusable.

        This barrier drains the pipeline: it is entered when a request fails, and once for all that succeed.
        """
        if self.runtime is None:
            return
        values = self.runtime.replica.group.gather_objects(value)
        if any(other != values[0] for other in values):
            raise RankError(self.mesh.rank, f"ranks disagree on the outcome of requests ({what}): {values}")

    @property
    def replica(self) -> Comm | None:
        """The communicator of all ranks that work on the same requests; None if this rank is alone."""
        return self.runtime.replica if self.runtime is not None else None

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has waited for messages of its replica."""
        if self.runtime is None:
            return 0.0
        comms = {id(comm): comm for comm in (self.runtime.comm, self.runtime.peers, self.runtime.replica)}
        return sum(comm.waited_s for comm in comms.values())

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its replica, which reports progress and collects outputs."""
        return self.mesh.member() == 0

    def close(self) -> None:
        """Leave the process group."""
        destroy_model_parallel()
        if dist.is_initialized() and self.mesh.world_size > 1:
            dist.destroy_process_group()
