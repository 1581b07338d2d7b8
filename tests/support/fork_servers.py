"""One fork server for many models: its imports take longer than most tests that need ranks of a real session."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardit.engine.process.fork_client import ForkServerClient
from tests.support.paths import SUPPORT

_idle: list[tuple[dict[str, str], ForkServerClient]] = []
"""Idle fork servers without ranks, the most recently used at the end, each with the environment of its start."""

KEPT = 2
"""More than one: a test may change the environment, or need ranks while those of its module are up."""


class KeptForkServer:
    """A `ForkServerClient` that is kept when its user is done with it, without its ranks, for the next user in the same
    environment."""

    def __init__(self, timeout_s: float, on_exit: Callable[[int, int], None], on_end: Callable[[str], None]):
        self._given_back = False
        self._environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        found = [one for one in _idle if one[0] == self._environment and one[1].alive]
        if not found:
            self._own = ForkServerClient(timeout_s, on_exit, on_end)
            return
        _idle.remove(found[-1])
        self._own = found[-1][1]
        self._own.timeout_s, self._own._on_exit, self._own._on_end = timeout_s, on_exit, on_end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def stop(self) -> None:
        """End the ranks, and keep the process if it answers."""
        if self._given_back:
            return
        self._given_back = True
        self._own._on_exit = self._own._on_end = lambda *_: None
        self._own.kill()
        if self._own.alive:
            _idle.append((self._environment, self._own))
        while len(_idle) > KEPT:
            _idle.pop(0)[1].stop()


@contextlib.contextmanager
def kept_fork_server() -> Iterator[None]:
    """Meanwhile ranks come from a fork server that other tests have used, and its Python path has tests/support."""
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *(part for part in path if part != str(SUPPORT))]))
        patch.setattr("shardit.engine.process.placement.ForkServerClient", KeptForkServer)
        yield
