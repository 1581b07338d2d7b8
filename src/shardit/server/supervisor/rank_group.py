"""All ranks of a server as one thing that is up or not: started, watched, ended and started anew."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardit.engine.process.channel import Channel
from shardit.engine.process.messages import Failed, OutOfMemory, Ready, Refused, SessionSpec
from shardit.engine.process.monitor import frames
from shardit.errors import InputError
from shardit.logs import logger
from shardit.server.placement.local import Placement
from shardit.server.process.loop import Loop, Pipe

_LOG = logger("supervisor")


SETTLE_S = 0.2
"""After a first sign that ranks have failed: time for others, which may tell more of the cause."""


@dataclass(frozen=True)
class Down:
    """Why the ranks are not up. users: the model or the options are at fault, and trying again is of no use. memory:
    it did not suffice, of which `OutOfMemory` has told. weight: the lowest is the likely root of several."""

    reason: str
    users: bool = False
    memory: bool = False
    weight: int = 0


class RankGroup:
    """The ranks of one server.

    on_up(infos) when all have loaded; on_down(Down) when one has failed or could not start, once per start; then
    `bring_up` starts all anew. on_message(rank, message) for all else. All three are called in the loop.
    """

    def __init__(
        self,
        spec: SessionSpec,
        placement: Placement,
        loop: Loop,
        *,
        on_up: Callable[[list[dict[str, Any]]], None],
        on_down: Callable[[Down], None],
        on_message: Callable[[int, Any], None],
    ):
        self.spec, self.placement, self._loop = spec, placement, loop
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self._generation = 0
        self._pipes: list[Pipe] = []
        self._infos: dict[int, dict[str, Any]] = {}
        self._downs: list[Down] = []
        self._starting: threading.Thread | None = None

    @property
    def states(self) -> list[str]:
        """Of each rank: "starting", "loading" or "ready"."""
        there = "loading" if self._pipes else "starting"
        return ["ready" if rank in self._infos else there for rank in range(self.size)]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.spec.config.world_size

    @property
    def failing(self) -> bool:
        """Whether ranks have failed, of which `on_down` will tell."""
        return bool(self._downs)

    def bring_up(self) -> None:
        """End what is left of the ranks and start them; returns at once."""
        self._leave()
        generation = self._generation
        self._starting = threading.Thread(target=self._start, args=(generation, self._starting), daemon=True)
        self._starting.start()

    def send(self, rank: int, message: Any) -> None:
        """Send to one rank, if the ranks are up."""
        if self._pipes:
            self._pipes[rank].send(message)

    def fail(self, reason: str) -> None:
        """Take the ranks for failed, whatever they say themselves."""
        self._downs.append(Down(reason))
        self._settle(self._generation)

    def hang(self, reason: str) -> None:
        """The same for ranks that are silent; the reason will tell where each is."""
        self._downs.append(Down(reason))

        def seen(stacks: dict[int, str]) -> None:
            found = {rank: frames(stack) for rank, stack in stacks.items()}
            where = "; ".join(f"rank {rank}: {(lines or ['it does not react'])[0]}" for rank, lines in found.items())
            self._downs.append(Down(f"{reason}; {where}" if where else reason, weight=-1))
            self._settle(self._generation)

        self.look(seen)

    def look(self, seen: Callable[[dict[int, str]], None]) -> None:
        """Find out where each rank is, which takes up to some seconds; then `seen(stacks)` is called in the loop, with
        {} where that cannot be told. It is not called if the ranks have failed meanwhile."""
        generation = self._generation

        def told(stacks: dict[int, str]) -> None:
            if generation == self._generation:
                seen(stacks)

        def work() -> None:
            stacks: dict[int, str] = {}
            with contextlib.suppress(Exception):  # whatever it is: who asked waits for an answer
                stacks = self.placement.stacks()
            self._loop.call(told, stacks)

        threading.Thread(target=work, daemon=True).start()

    def stop(self, code: int = 0) -> None:
        """End all ranks, for good; see `Placement.stop`."""
        self._leave()
        self.placement.stop(code)

    def _leave(self) -> None:
        self._generation += 1
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._infos, self._downs = [], {}, []

    def _start(self, generation: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            for rank, end in self.placement.kill().items():
                _LOG.info("rank_ended", rank=rank, how=end)  # by what signal, say
            channels = self.placement.start(self.spec)
        except InputError as error:
            self._loop.call(self._failed, generation, Down(str(error), users=True))
        except Exception as error:  # nobody else would hear of it
            self._loop.call(self._failed, generation, Down(f"the ranks could not be started: {error}"))
        else:
            self._loop.call(self._started, generation, channels)

    def _started(self, generation: int, channels: list[Channel]) -> None:
        if generation != self._generation:
            for channel in channels:
                channel.close()
            return

        def pipe(rank: int, channel: Channel) -> Pipe:
            return Pipe(
                channel,
                lambda message: self._loop.call(self._take, generation, rank, message),
                lambda: self._loop.call(self._failed, generation, Down(f"rank {rank} has ended", weight=2)),
            )

        self._pipes = [pipe(rank, channel) for rank, channel in enumerate(channels)]

    def _take(self, generation: int, rank: int, message: Any) -> None:
        if generation != self._generation:
            return
        if isinstance(message, Ready):
            self._infos[rank] = message.info
            if len(self._infos) == self.size:
                self._on_up([self._infos[number] for number in range(self.size)])
        elif isinstance(message, Refused):
            self._failed(generation, Down(message.text, users=True))
        elif isinstance(message, Failed):
            self._failed(generation, Down(f"rank {rank} failed: {message.reason}", weight=3 if message.of_peer else 1))
        else:
            self._on_message(rank, message)
            if isinstance(message, OutOfMemory):
                self._failed(generation, Down(f"rank {rank} ran out of memory: {message.reason}", memory=True))

    def _failed(self, generation: int, down: Down) -> None:
        if generation != self._generation:
            return
        if not self._downs:
            timer = threading.Timer(SETTLE_S, self._loop.call, (self._settle, generation))
            timer.daemon = True
            timer.start()
        self._downs.append(down)

    def _settle(self, generation: int) -> None:
        if generation == self._generation:
            root = min(self._downs, key=lambda down: down.weight)
            self._leave()
            self._on_down(root)
