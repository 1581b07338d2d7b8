"""Diffusers pipelines as a task: each request is one call of its own pipeline object."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import torch

from shardit.api import load_parallel
from shardit.core.comm.mesh import Mesh, pick_device
from shardit.diffusion.loading.attention_backends import check_attention_backend
from shardit.diffusion.loading.description import description_of
from shardit.diffusion.loading.pipeline import Prepared, check_scheduler, prepare
from shardit.diffusion.loading.required_packages import check_packages, check_processors, missing
from shardit.diffusion.loading.start_options import check_extras
from shardit.diffusion.loading.variants import image_pipeline
from shardit.diffusion.output.collect import NOT_NUMBERS, collect, error_text, with_arrays
from shardit.diffusion.output.output import Output
from shardit.diffusion.request.images import image_notes
from shardit.diffusion.request.model_info import ModelInfo
from shardit.diffusion.request.returned import sample_rate_of
from shardit.diffusion.run.ineffective import ineffective
from shardit.diffusion.run.own_pipeline import own_pipeline
from shardit.diffusion.run.processors import check_in_flight, processors_put_back
from shardit.diffusion.run.progress import report_progress
from shardit.diffusion.sharding.layout import lay_out
from shardit.engine.process.memory import held_bytes, limit_bytes
from shardit.engine.tasks.library_warnings import warnings_of
from shardit.engine.tasks.loaded_signature import loaded_signature
from shardit.engine.tasks.task import OnProgress
from shardit.errors import InputError
from shardit.loading.dtypes import check_components
from shardit.loading.safetensors_file import Reads

if TYPE_CHECKING:
    from shardit.diffusion.request.request import Request
    from shardit.engine.process.messages import SessionSpec

_checked: list[tuple[SessionSpec, Prepared]] = []
"""The argument of the last `check`, and the pipeline that it has built on meta. A forked rank gets a copy of it, which
loading consumes."""


def check(spec: SessionSpec) -> None:
    """Find mistakes before ranks start. Raises InputError. Reads no weights."""
    if spec.device is not None or torch.cuda.is_available():
        pick_device(spec.device, spec.config.world_size - 1, spec.config.transport == "host")
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


def load(spec: SessionSpec, mesh: Mesh) -> LoadedPipeline:
    """Load this rank's share of a pipeline. Collective."""
    return LoadedPipeline(spec, mesh)


class LoadedPipeline:
    """A pipeline with this rank's share of its weights, and the image-to-image pipeline over the same components."""

    def __init__(self, spec: SessionSpec, mesh: Mesh):
        self._of_server = spec.of_server
        checked, prepared = _checked.pop() if _checked else (None, None)
        reads = Reads()
        self.batcher = None
        self.pipe, self.assignment, self.runtime = load_parallel(
            spec.model,
            spec.config,
            mesh,
            dtype=spec.dtype,
            max_in_flight=spec.max_in_flight,
            reads=reads,
            attention_backend=spec.attention_backend,
            options=spec.options,
            prepared=prepared if checked == spec else None,
        )
        pipe = self.pipe
        check_in_flight(type(pipe), spec.max_in_flight)
        self.variants = {type(pipe).__name__: pipe}
        with_image = image_pipeline(pipe)
        if with_image is not None:
            self.variants[type(with_image).__name__] = with_image
        index, rate = dict(pipe.config), sample_rate_of(pipe.components)
        self.info = ModelInfo(
            loaded_signature(pipe, spec, index, rate),
            None if with_image is None else loaded_signature(with_image, spec, index),
            notes=tuple(map(str, self.assignment.notes)),
            bytes_read=reads.bytes,
            held_bytes=held_bytes(),
            limit_bytes=limit_bytes(int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))),
        )

    @contextmanager
    def opened(
        self, request: Request, on_progress: OnProgress, has_turn: Callable[[], bool]
    ) -> Iterator[tuple[Callable[[], Any], list[str]]]:
        """Open the call of a pipeline for a request; notes are warnings of diffusers, truncated prompts, NaN, and
        arguments without effect."""
        cut: list[str] = []
        odd: list[str] = []
        notes: list[str] = []
        pipe = self._own_pipeline(request, on_progress, cut.append)
        takes, arguments = inspect.signature(type(pipe).__call__).parameters, request.call_arguments()
        seeded = {"generator": torch.Generator("cpu").manual_seed(request.seed)} if "generator" in takes else {}
        note_nan = numpy.errstate(invalid="call", call=lambda *_: odd.append(NOT_NUMBERS))  # when images are made
        with warnings_of("diffusers", has_turn) as warned, processors_put_back(pipe), note_nan:
            yield functools.partial(pipe, **arguments, **seeded), notes
        notes += [*warned.lines, *dict.fromkeys(odd), *image_notes(arguments), *ineffective(arguments, takes, pipe)]
        if not any("truncated" in line for line in warned.lines):
            notes += dict.fromkeys(cut)

    def error_text(self, request: Request, error: Exception) -> str:
        """Return an error of a request in one line, with the remedy if there is one."""
        return error_text(request, error)

    def collect(self, request: Request, value: tuple[Any, float, list[str]] | None, error: str | None) -> Output:
        """Return the output of a request; a server's supervisor imports no torch, so it gets arrays in place of
        tensors."""
        output = collect(request, value, error)
        return with_arrays(output) if self._of_server else output

    def _own_pipeline(self, request: Request, on_progress: OnProgress, on_note: Callable[[str], None]) -> Any:
        if request.pipeline not in self.variants:
            raise InputError(f"no pipeline {request.pipeline}; this model has {', '.join(self.variants)}")
        report = functools.partial(report_progress, index=request.index, on_progress=on_progress)
        return own_pipeline(self.variants[request.pipeline], report, on_note)
