"""One rank's session: its share of the model, and the requests that it runs together with all other ranks."""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shardit.api import load_parallel
from shardit.core.comm.agreement import told
from shardit.core.comm.mesh import init_mesh, pick_device
from shardit.core.comm.p2p import Comm
from shardit.core.runtime.randomness import states
from shardit.core.runtime.request_loop import Program, Schedule, Turns
from shardit.diffusion.loading.attention_backends import check_attention_backend
from shardit.diffusion.loading.description import description_of
from shardit.diffusion.loading.pipeline import Prepared, check_scheduler, prepare
from shardit.diffusion.loading.required_packages import check_packages, check_processors, missing
from shardit.diffusion.loading.start_options import check_extras
from shardit.diffusion.loading.variants import image_pipeline
from shardit.diffusion.output.collect import collect
from shardit.diffusion.output.output import Output
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.returned import sample_rate_of
from shardit.diffusion.run.own_pipeline import own_pipeline
from shardit.diffusion.run.processors import check_in_flight, processors_put_back
from shardit.diffusion.run.progress import report_progress
from shardit.diffusion.sharding.layout import lay_out
from shardit.engine.library_warnings import warnings_of
from shardit.engine.loaded_signature import loaded_signature
from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.memory import held_bytes, limit_bytes
from shardit.engine.rank.serving import ServingWorker
from shardit.errors import InputError, RankError
from shardit.loading.dtypes import check_components
from shardit.loading.safetensors_file import Reads
from shardit.logs import take_over
from shardit.parallel_state import destroy_model_parallel

if TYPE_CHECKING:
    from shardit.diffusion.request.request import Request
    from shardit.engine.process.messages import SessionSpec

OnProgress = Callable[[int, int, int], None]


def check(spec: SessionSpec) -> None:
    """What can be known to be wrong before ranks start; raises InputError. Reads no weights."""
    if spec.device is not None or torch.cuda.is_available():
        pick_device(spec.device, spec.config.world_size - 1)
    check_attention_backend(spec.attention_backend)
    prepared = prepare(spec.model, None, spec.dtype, spec.options)
    found = description_of(prepared)
    check_scheduler(found.pipeline_class, found.components, spec.options)
    check_extras(found.pipeline_class, found.modules, spec.options)
    check_components(spec.dtype, found.modules)
    check_packages(found.pipeline_class.__name__, missing(found.pipeline_class))
    check_processors(part for name, part in found.components.items() if name not in found.modules)
    lay_out(found.modules, found.pipeline_class, spec.config, max_in_flight=spec.max_in_flight)
    check_in_flight(found.pipeline_class, spec.max_in_flight)
    _checked[:] = [(spec, prepared)]


_checked: list[tuple[SessionSpec, Prepared]] = []
"""What `check` was last called with, and the pipeline that it has built on meta. A rank that the fork server forks gets
a copy of it, which loading uses up."""


class Session:
    """A loaded model on one rank. All methods are collective over the ranks.

    info: what the user's process needs to know of the model, as picklable data.
    """

    def __init__(self, spec: SessionSpec, *, rank: int, world_size: int, init_method: str):
        self.spec = spec
        self._reads = Reads()
        self.mesh = init_mesh(
            spec.config, device=spec.device, timeout_s=spec.timeout_s, rank=rank, init_method=init_method
        )
        checked, prepared = _checked.pop() if _checked else (None, None)
        self._pipe, self._assignment, self.runtime = load_parallel(
            spec.model,
            spec.config,
            self.mesh,
            dtype=spec.dtype,
            max_in_flight=spec.max_in_flight,
            reads=self._reads,
            attention_backend=spec.attention_backend,
            options=spec.options,
            prepared=prepared if checked == spec else None,
        )
        check_in_flight(type(self._pipe), spec.max_in_flight)
        self.turns = self.runtime.turns if self.runtime else Turns(Schedule(0))
        self._variants = {type(self._pipe).__name__: self._pipe}
        with_image = image_pipeline(self._pipe)
        if with_image is not None:
            self._variants[type(with_image).__name__] = with_image
        index, rate = dict(self._pipe.config), sample_rate_of(self._pipe.components)
        self.info = ModelInfo(
            loaded_signature(self._pipe, spec, index, rate),
            None if with_image is None else loaded_signature(with_image, spec, index),
            notes=tuple(map(str, self._assignment.notes)),
            bytes_read=self._reads.bytes,
            held_bytes=held_bytes(),
            limit_bytes=limit_bytes(ranks_here(self.mesh.world_size)),
        )

    def serve(self, channel: Channel) -> None:
        """Run the requests that arrive at a channel until it is closed."""
        worker = ServingWorker(self, channel)
        if self.spec.of_server:
            take_over(worker.log, worker.current_request)
        try:
            for program in self.turns.rounds(worker.admit):
                worker.finish(program)
        except Closed:
            pass
        except Exception as error:
            worker.report(error)
            raise

    def generate(self, requests: list[Request], on_progress: OnProgress) -> dict[int, Output]:
        """Run requests that all ranks have, several at once, without a process that watches the ranks (torchrun). The
        outputs of a replica of the data axis, by the number of the request, are on its first rank; the others get {}.

        A mistake in a request ends that request alone. Raises RankError if ranks come to differ.
        """
        outputs: dict[int, Output] = {}
        programs = {}
        starts: list[tuple[int, str | None]] = []

        def make() -> Iterator[Program]:
            replicas = self.mesh.sizes["dp"]
            for position in range(self.mesh.coords["dp"], len(requests), replicas):
                program = self.program(requests[position], on_progress)
                programs[program] = position
                yield program

        for program in self.turns.run(make(), self.spec.max_in_flight):
            position = programs.pop(program)
            if program.error is not None:
                self.agree((position, type(program.error).__name__), f"here: {program.error!r}")
            starts.append((position, program.start))
            if self.leads:
                outputs[position] = collect(requests[position], program.value, program.error)
        self.agree(starts, "the first latents or the order of the requests")
        if self.runtime is not None:
            self.runtime.flush()
        return outputs

    def program(self, request: Request, on_progress: OnProgress) -> Program:
        """A request as one of the programs that take turns."""
        return Program(self._function(request, on_progress), request.seed)

    def _function(self, request: Request, on_progress: OnProgress) -> Callable[[], Any]:
        def run() -> tuple[Any, float, list[str]]:
            start = time.perf_counter()
            cut: list[str] = []
            pipe = self._own_pipeline(request, on_progress, cut.append)
            takes = "generator" in inspect.signature(type(pipe).__call__).parameters
            seeded = {"generator": torch.Generator("cpu").manual_seed(request.seed)} if takes else {}
            mine = self.turns.current
            with warnings_of("diffusers", lambda: self.turns.current is mine) as said, processors_put_back(pipe):
                out = pipe(**request.call_arguments(), **seeded)
            if self.runtime is not None:
                self.runtime.agreement.refuse_draws()
            if mine is not None:  # compared with the other ranks: what draws in a model may do so on one of them only
                mine.start = f"{mine.start}, generators {told(states(self.mesh.device, []))}"
            told_already = any("truncated" in line for line in said.lines)
            lines = said.lines if told_already else [*said.lines, *dict.fromkeys(cut)]
            return out, time.perf_counter() - start, lines

        return run

    def _own_pipeline(self, request: Request, on_progress: OnProgress, tell: Callable[[str], None]) -> Any:
        if request.pipeline not in self._variants:
            raise InputError(f"no pipeline {request.pipeline}; this model has {', '.join(self._variants)}")
        report = functools.partial(report_progress, index=request.index, on_progress=on_progress)
        return own_pipeline(self._variants[request.pipeline], report, tell)

    def agree(self, value: Any, what: str) -> None:
        """Compare something that must be the same on all ranks, or the group is no longer to be trusted.

        A meeting of all ranks drains the pipeline: it is held when a request fails, and once for all that succeed.
        """
        if self.runtime is None:
            return
        values = self.runtime.replica.group.gather_objects(value)
        if any(other != values[0] for other in values):
            raise RankError(self.mesh.rank, f"ranks differ in how requests went ({what}): {values}")

    @property
    def replica(self) -> Comm | None:
        """All ranks that work on the same requests; None where this rank is alone."""
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


def ranks_here(world_size: int) -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
