"""The real session, with faults on demand: words of a prompt such as "raise:1:2" mean: on rank 1, after 2 steps, raise.

"keep:4" in a prompt: keep 4 plans from that request on. "plans?": the last warning of the output tells how many there
are.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from shardit.core.plans import known_plans
from shardit.engine import session
from shardit.engine.session import check

__all__ = ["Session", "check"]

MAX_SIGNATURES = known_plans.MAX_SIGNATURES


class Session(session.Session):
    def program(self, request: Any, on_progress: Any) -> Any:
        words = (request.prompt or "").partition("keep:")[2].split()
        known_plans.MAX_SIGNATURES = int(words[0]) if words else MAX_SIGNATURES
        return super().program(request, on_progress)

    def _function(self, request: Any, on_progress: Any) -> Any:
        deeds = [word.split(":") for word in (request.prompt or "").split() if word.count(":") == 2]

        def progress(index: int, step: int, total: int) -> None:
            on_progress(index, step, total)
            for deed, rank, at in deeds:
                if int(rank) == self.mesh.rank and int(at) == step:
                    DEEDS[deed]()

        run = super()._function(request, progress)

        def with_plans() -> Any:
            result, seconds, lines = run()
            if "plans?" in (request.prompt or ""):
                kept = [len(getattr(self.model.pipe, name).shardit_stages.plans) for name in self.model.assignment.cut]
                lines = [*lines, f"plans {max(kept)}"]
            return result, seconds, lines

        return with_plans


def fail() -> None:
    raise KeyError("on one rank only")


def too_much() -> None:
    raise MemoryError("as if the memory did not suffice")


DEEDS = {
    "raise": fail,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "oom": too_much,
    "nap": lambda: time.sleep(1.0),
}
