"""Channels between processes: the end of one side is seen by the other."""

from __future__ import annotations

import socket
import time

import pytest

from shardit.engine.process.channel import Channel, Closed, Pipe


def test_the_other_side_sees_the_end_whichever_thread_runs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    pipe, other = Pipe(Channel(ours), lambda _: None, lambda: None), Channel(theirs, timeout_s=5)
    put = pipe._out.put

    class Slow:
        """The queue of the pipe, whose writer acts before anything else does."""

        get = pipe._out.get

        def put(self, item: object) -> None:
            put(item)
            time.sleep(0.2)

    monkeypatch.setattr(pipe, "_out", Slow())
    pipe.send("hello")
    assert other.recv() == "hello"
    pipe.close()
    with pytest.raises(Closed):
        other.recv()
    other.close()
