"""`Task`: a kind of model that ranks run, as a session sees it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from shardit.core.comm.mesh import Mesh
    from shardit.core.stages.runtime import Runtime
    from shardit.diffusion.request.model_info import ModelInfo
    from shardit.engine.process.messages import SessionSpec


class OnProgress(Protocol):
    """Called after each step of a request."""

    def __call__(self, index: int, step: int, total: int, made: Any = None, /) -> None:
        """index: number of the request. step, total: steps that are done, and all of them. made: what the step has
        given, where results come step by step."""
        ...


class Model(Protocol):
    """A loaded model, of which this rank holds its share.

    runtime: how calls of the model run together with other ranks; None with one rank. info: for the user's process.
    """

    runtime: Runtime | None
    info: ModelInfo

    def opened(
        self, request: Any, on_progress: OnProgress, has_turn: Callable[[], bool]
    ) -> AbstractContextManager[tuple[Callable[[], Any], list[str]]]:
        """A request while it runs: the call of the model, and notes for the user, complete when the context ends.
        has_turn: whether the code that runs now is that of this request."""
        ...

    def error_text(self, request: Any, error: Exception) -> str:
        """An error of a request in one line."""
        ...

    def collect(self, request: Any, value: Any, error: str | None) -> Any:
        """The picklable result of a request. value: (result of the call, seconds, notes), None after an error."""
        ...


class Task(Protocol):
    """A module of this folder."""

    def check(self, spec: SessionSpec) -> None:
        """Find mistakes before ranks start. Raises InputError. Reads no weights."""
        ...

    def load(self, spec: SessionSpec, mesh: Mesh) -> Model:
        """Load this rank's share of the model. Collective."""
        ...


def task_of(spec: SessionSpec) -> Task:
    """The task that a specification names."""
    return cast(Task, importlib.import_module(spec.task))
