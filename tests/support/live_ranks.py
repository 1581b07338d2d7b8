"""Ranks of a server without the server: a `RankGroup` whose messages a test can wait for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from shardit.config import DiffusionParallelConfig
from shardit.engine.process.channel import Packed, send_all
from shardit.engine.process.failure import Failure
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import SESSION, Begin, Cancel, Progress, RequestFinished, SessionSpec
from shardit.engine.process.placement import LocalPlacement
from shardit.engine.process.rank_group import RankGroup
from shardit.models import tiny
from shardit.server.jobs.job_request import build_request
from tests.support.fork_servers import kept_fork_server

WAIT_S = 240.0


class LiveRanks:
    """All messages of the ranks so far, in order: (rank, message)."""

    def __init__(self, model: str, session: str = SESSION, max_in_flight: int = 3, **sizes: int):
        self.model = model
        self.said: list[tuple[int, Any]] = []
        self.ups: list[list[dict[str, Any]]] = []
        self.downs: list[Failure] = []
        self._changed = threading.Condition()
        self.loop = Loop(lambda: None)
        config = DiffusionParallelConfig(**sizes)
        spec = SessionSpec(
            f"tiny/{model}", config, max_in_flight=max_in_flight, session=session, of_server=True, timeout_s=60
        )
        self.rank_group = RankGroup(
            spec,
            LocalPlacement(60),
            self.loop,
            on_up=self._note(self.ups.append),
            on_down=self._note(self.downs.append),
            on_message=self._note(lambda rank, message: self.said.append((rank, message))),
        )
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start or restart the ranks, and wait until they are up."""
        before = len(self.ups)
        self.loop.call(self.rank_group.bring_up)
        self.wait(lambda: len(self.ups) > before or bool(self.downs))
        assert len(self.ups) > before, self.downs

    def begin(self, key: int, seed: int, **chosen: Any) -> None:
        """Send a request to all ranks of the first replica."""
        call = {**tiny.defaults(self.model), "prompt": "a cat", **chosen}
        request = build_request(call, seed, [], self.ups[-1][0])
        self.loop.call(self._send, Begin(key, Packed.of(request)))

    def cancel(self, key: int) -> None:
        """Cancel it on all ranks."""
        self.loop.call(self._send, Cancel(key))

    def _send(self, message: Any) -> None:
        send_all(self.rank_group.pipes(range(self.rank_group.size)), message)

    def ends(self, key: int) -> list[RequestFinished]:
        """Wait until all ranks have finished a request; return their messages, the first rank's first."""

        def found() -> list[tuple[int, RequestFinished]]:
            return [(rank, m) for rank, m in list(self.said) if isinstance(m, RequestFinished) and m.key == key]

        self.wait(lambda: len(found()) == self.rank_group.size or bool(self.downs))
        assert not self.downs, self.downs
        return [message for _, message in sorted(found(), key=lambda entry: entry[0])]

    def steps(self, key: int) -> list[int]:
        """The steps that were reported so far."""
        return [m.step for _, m in list(self.said) if isinstance(m, Progress) and m.key == key]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until something holds."""
        deadline = time.monotonic() + WAIT_S
        with self._changed:
            while not condition():
                assert time.monotonic() < deadline, "nothing happens"
                self._changed.wait(1.0)

    def stop(self) -> None:
        """End everything."""
        self.loop.call(self.rank_group.stop)
        self.loop.call(self.loop.stop)
        self._thread.join(30)

    def _note(self, act: Callable[..., None]) -> Callable[..., None]:
        def noted(*values: Any) -> None:
            with self._changed:
                act(*values)
                self._changed.notify_all()

        return noted


@contextlib.contextmanager
def live_ranks(model: str, **options: Any) -> Iterator[LiveRanks]:
    """Ranks that are up."""
    with kept_fork_server():
        ranks = LiveRanks(model, **options)
        try:
            ranks.start()
            yield ranks
        finally:
            ranks.stop()
