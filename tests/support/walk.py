"""The way of a request from the command line to a block call, as it is: `python -m tests.support.walk` prints it.

A tiny pipeline runs on two stages. The stacks are those of the caller when it pickles the request, hands it to another
thread and sends it, and of the first rank in the first block call of the last step.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from shardit import Omni
from shardit.cli import main as shardit
from shardit.diffusion.request.request import Request
from tests.support.paths import SUPPORT
from tests.support.walk_session import PACKAGE, WALK_FILE, way_to

MAIN = ("engine/rank/worker.py", "main")
"""The function that a rank begins with; what is below it on the stack belongs to the process that was forked."""

COMMAND = ["generate", "--model=tiny/flux", "--prompt=cat", "--num-inference-steps=3", "--pipeline-parallel-size=2"]

Way = dict[str, list[str]]
"""Functions by file, both in the order in which the way comes to them."""


def walk() -> Way:
    """Run a request and return its way."""
    of_caller: dict[str, list[tuple[str, str]]] = {}

    def note(event: str) -> None:
        of_caller.setdefault(event, way_to(sys._getframe(2)))

    def pickled(request: Request, protocol: Any) -> Any:
        note("pickled")
        return object.__reduce_ex__(request, protocol)

    class Handed(queue.SimpleQueue):
        def put(self, item: Any, *how: Any) -> None:
            if isinstance(item, list) and any(map(holds_request, item)):
                note("handed over")
            super().put(item, *how)

    def sent(sock: socket.socket, data: Any, *flags: Any) -> None:
        if holds_request(data):
            note("sent")
        sendall(sock, data, *flags)

    sendall = socket.socket.sendall
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder, "stack.json")
        settings = {"PYTHONPATH": str(SUPPORT), WALK_FILE: str(file), "SHARDIT_PROGRESS": "0"}
        stack.enter_context(mock.patch.dict(os.environ, settings))
        stack.enter_context(mock.patch.object(Omni, "_session", "walk_session:Session"))
        stack.enter_context(mock.patch.object(Request, "__reduce_ex__", pickled))
        stack.enter_context(mock.patch.object(queue, "SimpleQueue", Handed))
        stack.enter_context(mock.patch.object(socket.socket, "sendall", sent))
        assert shardit([*COMMAND, f"--output={folder}/cat.png"]) == 0
        of_rank = [(file, function) for file, function in json.loads(file.read_text())]
    assert of_caller.keys() == {"pickled", "handed over", "sent"}
    stacks = [*of_caller.values(), of_rank[of_rank.index(MAIN) :]]
    return by_file([place for stack in stacks for place in stack])


def holds_request(data: Any) -> bool:
    """Whether a part of a message holds a pickled request."""
    return Request.__module__.encode() in bytes(data)


def by_file(stack: Iterable[tuple[str, str]]) -> Way:
    """The functions of a stack by file, each once."""
    found: Way = {}
    for file, function in stack:
        functions = found.setdefault(file, [])
        if function not in functions and not function.startswith("<"):  # lambdas and the like
            functions.append(function)
    return found


def lines(file: str) -> int:
    """The lines of a file of the package."""
    return len((PACKAGE / file).read_text("utf-8").splitlines())


def main() -> None:
    """Print the files, their functions and lines."""
    way = walk()
    for file, functions in way.items():
        print(f"{lines(file):5}  {file}: {', '.join(functions)}")
    print(f"{sum(map(lines, way)):5}  lines in {len(way)} files")


if __name__ == "__main__":
    main()
