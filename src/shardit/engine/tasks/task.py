"""`Task`: the interface of a kind of model to a session."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from shardit.core.comm.mesh import Mesh
    from shardit.core.runtime.program import Program
    from shardit.core.stages.runtime import Runtime
    from shardit.diffusion.request.model_info import ModelInfo
    from shardit.engine.process.messages import SessionSpec


class OnProgress(Protocol):
    """Called after each step of a request."""

    def __call__(self, index: int, step: int, total: int, made: Any = None, /) -> None:
        """index: number of the request. step, total: finished steps and all steps. made: result of the step, if results
        come step by step."""
        ...


class RequestBatcher(Protocol):
    """Runs the requests of a model in shared batches. All ranks of a replica call it alike.

    on_end: called with the key and the result of a request that has ended, on every rank. on_step: called when all
    tokens of a step have been reported, before `on_end`. pause: called between the rounds of a batch, in its program.
    """

    on_end: Callable[[int, Any], None]
    on_step: Callable[[], None]
    pause: Callable[[], None]

    @property
    def is_open(self) -> bool:
        """Whether there are unfinished requests."""
        ...

    @property
    def cache_use(self) -> tuple[int, int | None, int, int]:
        """Return the bytes of all caches and their limit, and since the start how many prompts began with kept keys,
        and their tokens that were not computed again."""
        ...

    def add(self, key: int, request: Any, on_tokens: Callable[[int, int, Any, Any], None]) -> None:
        """Queue a request. on_tokens: called with step, total, the result of each step, and its log probabilities."""
        ...

    def cancel(self, key: int) -> bool:
        """Forget a request. Return whether it was open."""
        ...

    def program(self) -> Program | None:
        """Return a program that runs a new batch, if a request needs one."""
        ...

    def suspects(self, program: Program) -> set[int]:
        """Return the keys of the requests one of which has most likely used up the memory in a program."""
        ...

    def ended(self, program: Program) -> set[int]:
        """Record the end of a program. Return the keys of requests that have failed with it."""
        ...


class LoadedModel(Protocol):
    """A loaded model with this rank's share of the weights.

    runtime: runs calls of the model together with other ranks; None with one rank. info: for the user's process.
    batcher: runs its requests in shared batches; None if each request is a program of its own, by `opened`.
    """

    runtime: Runtime | None
    info: ModelInfo
    batcher: RequestBatcher | None

    def opened(
        self, request: Any, on_progress: OnProgress, has_turn: Callable[[], bool]
    ) -> AbstractContextManager[tuple[Callable[[], Any], list[str]]]:
        """Open a request: yields the call of the model, and notes for the user, complete when the context ends.
        has_turn: returns whether the running code belongs to this request. Not called if there is a batcher."""
        ...

    def error_text(self, request: Any, error: Exception) -> str:
        """Return an error of a request in one line."""
        ...

    def collect(self, request: Any, value: Any, error: str | None) -> Any:
        """Return the picklable result of a request. value: (result of the call, seconds, notes), None after an
        error."""
        ...


class Task(Protocol):
    """The interface of a module in this folder."""

    def check(self, spec: SessionSpec) -> None:
        """Find mistakes before ranks start. Raises InputError. Reads no weights."""
        ...

    def load(self, spec: SessionSpec, mesh: Mesh) -> LoadedModel:
        """Load this rank's share of the model. Collective."""
        ...


def task_of(spec: SessionSpec) -> Task:
    """Return the task named in a specification."""
    return cast(Task, importlib.import_module(spec.task))
