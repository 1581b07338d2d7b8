"""The real session, whose first block writes down the way of its calls: all functions of the package on the stack."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import greenlet

import shardit
from shardit.engine import session
from shardit.engine.session import check

__all__ = ["Session", "check"]

PACKAGE = Path(shardit.__file__).parent
WALK_FILE = "WALK_FILE"
"""The variable in the environment that names the file to write; the last call of the block is kept."""


class Session(session.Session):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        (name, cut), *_ = self.model.assignment.cut.items()
        if self.mesh.rank == 0:
            write_calls(getattr(self.model.pipe, name).get_submodule(cut.blocks[0]), Path(os.environ[WALK_FILE]))


def write_calls(block: Any, path: Path) -> None:
    """Let the forward of a block write the way of each call over that of the one before."""
    own_forward = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        path.write_text(json.dumps(way_to(sys._getframe(1))))
        return own_forward(*args, **kwargs)

    block.forward = forward


def way_to(frame: FrameType) -> list[tuple[str, str]]:
    """(file, function) of the frames of the package, from the outermost to this one."""
    found = [(Path(one.f_code.co_filename), one.f_code.co_name) for one in frames(frame)]
    return [(path.relative_to(PACKAGE).as_posix(), name) for path, name in found if PACKAGE in path.parents][::-1]


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames below one, also those of the coroutines that have resumed the running one."""
    coroutine = greenlet.getcurrent()
    while frame is not None:
        yield frame
        if frame.f_back is None and coroutine is not None:
            coroutine = coroutine.parent
            frame = coroutine.gr_frame if coroutine is not None else None
        else:
            frame = frame.f_back
