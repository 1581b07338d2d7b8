"""Starts the ranks of an `Omni` or an `LLM`, or joins those started by torchrun."""

from __future__ import annotations

import os
import weakref
from typing import Any

from shardit.engine.joined_ranks import JoinedRanks
from shardit.engine.process.failure import Timeouts
from shardit.engine.process.messages import SessionSpec
from shardit.engine.process.placement import Placement
from shardit.engine.process.process import started_by_torchrun
from shardit.engine.started_ranks import StartedRanks


def start_ranks(
    owner: Any, spec: SessionSpec, timeouts: Timeouts, placement: Placement | None = None
) -> tuple[JoinedRanks | StartedRanks, Any]:
    """Return the ranks, with the model loaded, and the function that stops them, which is called when `owner` is
    deleted. placement: starts the ranks, by default on this machine."""
    ranks = JoinedRanks(spec) if started_by_torchrun(os.environ) else StartedRanks(spec, timeouts, placement)
    end = weakref.finalize(owner, ranks.close)
    try:
        ranks.start()
    except BaseException:
        end()
        raise
    return ranks, end
