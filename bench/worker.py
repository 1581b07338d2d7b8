"""What a rank of the bench can do: hold plain pipelines and sessions, run requests, and say what that took."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import shardit
from bench import host, model, numerics, operations, peers
from bench.groups import shared_groups
from shardit.config import DiffusionParallelConfig
from shardit.core.comm.mesh import axis_sizes
from shardit.diffusion.sharding import component_sharding
from shardit.engine import session as session_module
from shardit.engine.inspect import inspect_model
from shardit.engine.process.messages import SessionSpec
from shardit.engine.session import Session
from shardit.models import tiny

TIMEOUT_S = 300


class Worker:
    """One rank. Every public method is a command; what it returns travels to the bench."""

    def __init__(self, rank: int, count: int, method: str):
        torch.set_num_threads(1)
        os.environ["LOCAL_RANK"] = str(rank)
        self.rank, self.count, self.method = rank, count, method
        self._plain: Any = None
        self._peers: dict[str, Any] = {}
        self._meshes: dict[Any, Any] = {}
        self._sessions: dict[str, Session] = {}

    def write_model(self, size: model.Size, folder: str) -> None:
        """Write the folder of the measured model."""
        model.write_model(size, folder)

    def host_us(self, kind: str, options: dict[str, Any] | None, runs: int) -> float:
        """Measure the host time of a forward; see `bench.host`."""
        if options is not None:
            dist.init_process_group("gloo", init_method=self.method, rank=self.rank, world_size=self.count)
        return host.forward_us(kind, options, runs)

    def message_us(self) -> float:
        """Measure the host time of a bare message; see `bench.host`."""
        return host.message_us(self.method, self.rank)

    def turn_us(self) -> float:
        """Measure the host time of a turn; see `bench.host`."""
        return host.turn_us()

    def open_plain(self, folder: str) -> None:
        """Load the whole pipeline with diffusers alone."""
        self._plain = tiny.load_plain(folder)
        self._plain.set_progress_bar_config(disable=True)

    def open_session(self, name: str, folder: str, options: dict[str, Any], in_flight: int) -> dict[str, Any]:
        """Load this rank's share; returns what the session says of itself and the chunks per rank."""
        config = DiffusionParallelConfig(**options)
        spec = SessionSpec(folder, config, "float32", "cpu", in_flight, timeout_s=TIMEOUT_S)
        with self._one_mesh():
            session = Session(spec, rank=self.rank, world_size=self.count, init_method=self.method)
        self._sessions[name] = session
        return {"chunks": session.model.assignment.chunks, "bytes_read": session.info.bytes_read}

    @contextlib.contextmanager
    def _one_mesh(self) -> Iterator[None]:
        """Let all sessions of one shape share a mesh: each group has a thread of gloo's that takes 0.1 % of a core."""
        own = session_module.init_mesh

        def init_mesh(config: DiffusionParallelConfig, **options: Any) -> Any:
            shape = tuple(axis_sizes(config).items())
            if shape not in self._meshes:
                self._meshes[shape] = own(config, **options)
            return self._meshes[shape]

        with mock.patch.object(session_module, "init_mesh", init_mesh):
            yield

    def run_plain(self, size: model.Size, seeds: tuple[int, ...], guided: bool) -> dict[str, Any]:
        """The requests one after the other, by plain diffusers."""
        return self._one_by_one(self._plain, size, seeds, guided)

    def _one_by_one(self, pipeline: Any, size: model.Size, seeds: tuple[int, ...], guided: bool) -> dict[str, Any]:
        requests = model.make_requests(size, seeds, guided)

        def work() -> dict[int, torch.Tensor]:
            outs = {}
            for request in requests:
                generator = torch.Generator("cpu").manual_seed(request.seed)
                outs[request.index] = pipeline(**request.call_arguments(), generator=generator).frames
            return outs

        return measured(work)

    def open_peer(self, name: str, folder: str, size: model.Size, seed: int) -> dict[str, Any]:
        """Load the whole pipeline with diffusers, change it to that of another library, and run one guided request.

        Another version of that library may not fit `bench.peers`: then the result has the error as "failed".
        """
        self._join()
        pipeline = tiny.load_plain(folder)
        pipeline.set_progress_bar_config(disable=True)
        try:
            with shared_groups():
                peers.PEERS[name].apply(pipeline)
            result = self._one_by_one(pipeline, size, (seed,), True)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
        self._peers[name] = pipeline
        return result

    def _join(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=self.method, rank=self.rank, world_size=self.count)

    def distance(self, folder: str, size: model.Size, dtype: str, options: dict[str, Any]) -> float:
        """How far one way of running the transformer is from float64."""
        return numerics.distance(folder, size, dtype, options, self._join)

    def run_peer(self, name: str, size: model.Size, seeds: tuple[int, ...], guided: bool) -> dict[str, Any]:
        """The requests one after the other, by such a pipeline. Every rank that runs it makes all of them."""
        if name not in peers.PEERS or peers.PEERS[name].ranks > 1:
            dist.barrier()
        return self._one_by_one(self._peers[name], size, seeds, guided)

    def run_session(self, name: str, size: model.Size, seeds: tuple[int, ...], guided: bool) -> dict[str, Any]:
        """The requests over all ranks, as many at once as the session allows."""
        session = self._sessions[name]
        requests = model.make_requests(size, seeds, guided)

        def work() -> dict[int, torch.Tensor]:
            outputs = session.generate(requests, lambda *_: None)
            errors = [output.error for output in outputs.values() if output.error]
            if errors:
                raise RuntimeError(errors[0])
            return {index: output.latents for index, output in outputs.items()}

        comm = session.runtime.replica if session.runtime else None
        sent = comm.sent_bytes if comm else 0
        if self.count > 1:
            dist.barrier()
        result = measured(work)
        return {**result, "sent_bytes": comm.sent_bytes - sent if comm else 0}

    def interleave(self, name: str, size: model.Size, runs: int) -> list[tuple[float, float]]:
        """CPU seconds per step of plain diffusers and of a session on one rank, alternately, `runs` times."""
        pairs = []
        for i in range(runs + 1):
            plain: Callable[[], Any] = lambda: self.run_plain(size, (1,), False)  # noqa: E731
            ours: Callable[[], Any] = lambda: self.run_session(name, size, (1,), False)  # noqa: E731
            order = (plain, ours) if i % 2 else (ours, plain)
            cpu = {act: act()["cpu_s"] / size.steps for act in order}
            pairs.append((cpu[plain], cpu[ours]))
        return pairs[1:]  # the first one warms up

    def owned_bytes(self, folder: str) -> list[int]:
        """Bytes in the files of what each of two ranks owns, found without reading weights."""
        found = inspect_model(folder, DiffusionParallelConfig(pipeline_parallel_size=2))
        return [sum(part["bytes"] for part in rank["components"].values()) for rank in found["ranks"]]

    def memory(self) -> dict[str, int]:
        """Bytes of this process: now, and the most since the last `reset_peak`."""
        now = _status("VmRSS")
        return {"now": now, "peak": max(now, _status("VmHWM"))}

    def reset_peak(self) -> None:
        """Let the peak of `memory` begin anew."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def open_sharded(self, name: str, folder: str, options: dict[str, Any]) -> None:
        """Load the whole pipeline with diffusers and shard its transformer."""
        self._join()
        self._peers[name] = tiny.load_plain(folder)
        self._peers[name].set_progress_bar_config(disable=True)
        shardit.parallelize(self._peers[name].transformer, DiffusionParallelConfig(**options))

    def operations(self, name: str | None, size: model.Size, seeds: tuple[int, ...]) -> dict[str, float]:
        """Seconds by kind of operation of such a pipeline, or of plain diffusers; see `bench.operations`."""
        # Calls under a profiler are refused, as no range may be open when coroutines switch; operations never are.
        allowed = mock.patch.object(component_sharding, "refuse_profiler")
        with allowed, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            run = self.run_plain(size, seeds, False) if name is None else self.run_peer(name, size, seeds, False)
        return operations.seconds_by_kind(profiler, run["end"] - run["start"], run["main_s"], run["cpu_s"])

    def profile(self, name: str, size: model.Size, seeds: tuple[int, ...], guided: bool) -> str:
        """`run_session` under cProfile: the functions with the most time of their own (for people, see README)."""
        import cProfile
        import io
        import pstats

        profiler = cProfile.Profile()
        profiler.enable()
        self.run_session(name, size, seeds, guided)
        profiler.disable()
        out = io.StringIO()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(35)
        return out.getvalue()


def measured(work: Callable[[], dict[int, torch.Tensor]]) -> dict[str, Any]:
    """Run it; the clock at start and end (one clock for all processes of a machine), CPU time (of it
    in the main thread, of it in the kernel), page faults, and of each request number, digest and latents."""
    faults, system, cpu, main, start = _faults(), _system_s(), time.process_time(), time.thread_time(), time.monotonic()
    tensors = work()
    end = time.monotonic()
    return {
        "start": start,
        "end": end,
        "cpu_s": time.process_time() - cpu,
        "main_s": time.thread_time() - main,
        "sys_s": _system_s() - system,
        "faults": _faults() - faults,
        "outputs": [(index, digest(tensor), tensor.detach().numpy()) for index, tensor in tensors.items()],
    }


def digest(tensor: torch.Tensor) -> str:
    """A hash of a tensor's shape, dtype and bits."""
    data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + data).hexdigest()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _system_s() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
