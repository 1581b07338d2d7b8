"""Starts the ranks of an `Omni` or an `LLM`, or joins those started by torchrun."""

from __future__ import annotations

import os
import weakref
from typing import Any

from shardit.engine.joined_ranks import JoinedRanks
from shardit.engine.local_ranks import LocalRanks
from shardit.engine.process.failure import Timeouts
from shardit.engine.process.messages import SessionSpec
from shardit.engine.process.process import started_by_torchrun


def start_ranks(owner: Any, spec: SessionSpec, timeouts: Timeouts) -> tuple[JoinedRanks | LocalRanks, Any]:
    """Return the ranks, with the model loaded, and the function that stops them, which is called when `owner` is
    deleted."""
    ranks = JoinedRanks(spec) if started_by_torchrun(os.environ) else LocalRanks(spec, timeouts)
    end = weakref.finalize(owner, ranks.close)
    try:
        ranks.start()
    except BaseException:
        end()
        raise
    return ranks, end
