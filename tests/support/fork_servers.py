"""One fork server for many models: its imports take longer than most tests that need ranks of a real session."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from shardit.engine.process.fork_client import STOP_WAIT_S, ForkServer
from shardit.engine.process.messages import Gone, Kill
from tests.support.paths import SUPPORT

_idle: list[tuple[dict[str, str], dict[str, Any]]] = []
"""At most one that runs without ranks: the environment that it was started in, and its attributes."""


class KeptForkServer(ForkServer):
    """Is kept when its user is done with it, without its ranks, for the next user in the same environment."""

    def __init__(self, timeout_s: float):
        self._given_back = False
        self._started_in = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        while _idle:
            environment, attributes = _idle.pop()
            self.__dict__.update(attributes, timeout_s=timeout_s)
            if environment == self._started_in and self.alive:
                return
            super().stop()
        super().__init__(timeout_s)

    def stop(self) -> None:
        """End the ranks, and keep the process if it answers."""
        if self._given_back:
            return
        self._given_back = True
        if not self._checked or not self.alive:
            super().stop()
            return
        try:
            self.control.socket.settimeout(STOP_WAIT_S)
            self.control.send(Kill())
            self.receive(Gone)
        except Exception:
            super().stop()
            return
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
        kept = {"process": self.process, "control": self.control, "_checked": True, "pids": [], "directory": None}
        _idle.append((self._started_in, kept))


@contextlib.contextmanager
def kept_fork_server() -> Iterator[None]:
    """Meanwhile ranks come from a fork server that other tests have used, and its Python path has tests/support."""
    with pytest.MonkeyPatch.context() as patch:
        path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *(part for part in path if part != str(SUPPORT))]))
        patch.setattr("shardit.engine.omni.ForkServer", KeptForkServer)
        patch.setattr("shardit.server.placement.local.ForkServer", KeptForkServer)
        yield
