"""All ranks of a model as one unit that is up or down: starts, monitors, stops and restarts them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from shardit.diffusion.request.model_info import ModelInfo
from shardit.engine.process.channel import Channel, Pipe
from shardit.engine.process.failure import Cause, Failure, Timeouts, root_of
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import Failed, InputRejected, OutOfMemory, Ready, SessionSpec
from shardit.engine.process.placement import Placement
from shardit.engine.process.stacks import described, suspect
from shardit.errors import InputError, RankError

LAST_MESSAGE_DELAY_S = 0.2
"""Time to wait, in seconds, for messages that a rank has sent before its process ended."""


class RankGroup:
    """The ranks of one model.

    on_up(infos): all have loaded. on_down(failure): one has failed or could not start; called once per start, with the
    likely root of all failures; then `bring_up` starts all again. on_message(rank, message): any other message.
    on_exit(rank, how): the process of a rank has ended. All are called in the loop.
    """

    def __init__(
        self,
        spec: SessionSpec,
        placement: Placement,
        loop: Loop,
        *,
        on_up: Callable[[list[ModelInfo]], None],
        on_down: Callable[[Failure], None],
        on_message: Callable[[int, Any], None],
        on_exit: Callable[[int, str], None] = lambda *_: None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    ):
        self.spec, self.placement, self._loop, self.timeouts = spec, placement, loop, timeouts
        self._on_up, self._on_down, self._on_message, self._on_exit = on_up, on_down, on_message, on_exit
        self._generation = 0
        self._pipes: list[Pipe] = []
        self._infos: dict[int, ModelInfo] = {}
        self._failures: dict[Failure, float] = {}  # -> time of the decision about the root, if none is earlier
        self._exits: dict[int, Failure] = {}  # of processes whose last messages have not arrived yet
        self._closed: set[int] = set()
        self._hanging = False
        self._starting: threading.Thread | None = None
        self.explain: Callable[[], Failure | None] = lambda: None
        """Returns another explanation for a failure that mentions a peer's failure, if there is one."""
        self.loading_since: float | None = None
        """Time of the latest message from ranks that load, by the monotonic clock."""

    @property
    def states(self) -> list[str]:
        """The state of each rank: "starting", "loading" or "ready"."""
        there = "loading" if self._pipes else "starting"
        return ["ready" if rank in self._infos else there for rank in range(self.size)]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.spec.config.world_size

    @property
    def loading(self) -> list[int]:
        """Return the ranks that have not loaded their share yet."""
        return [rank for rank in range(self.size) if rank not in self._infos]

    @property
    def failing(self) -> bool:
        """Whether ranks have failed and `on_down` will report it."""
        return self._hanging or bool(self._failures)

    def bring_up(self) -> None:
        """Stop the remaining ranks and start all; returns at once."""
        self.disconnect()
        generation = self._generation
        self._starting = threading.Thread(target=self._start, args=(generation, self._starting), daemon=True)
        self._starting.start()

    def pipes(self, ranks: Iterable[int]) -> list[Pipe]:
        """Return the pipes to some ranks, none if the ranks are not up."""
        return [self._pipes[rank] for rank in ranks] if self._pipes else []

    def fail(self, reason: str, rank: int = -1) -> None:
        """Treat the ranks as failed, without a failure of their own."""
        self._note(self._generation, Failure(reason, rank=rank))

    def hang(self, reason: str, silent: Iterable[int], if_unseen: Failure | None = None) -> None:
        """Treat `silent` ranks as failed, and find the one that holds up the others. `if_unseen` is reported if the
        stacks cannot be read."""
        self._hanging = True
        ranks, generation = list(silent), self._generation

        def seen(stacks: dict[int, str]) -> None:
            self._note(generation, _hang(reason, stacks, ranks) if stacks else if_unseen or Failure(reason))

        self.read_stacks(seen)

    def read_stacks(self, seen: Callable[[dict[int, str]], None]) -> None:
        """Read the stacks of all ranks, which takes up to some seconds; then call `seen(stacks)` in the loop, with {}
        if they cannot be read. It is not called if the ranks have failed meanwhile."""
        generation = self._generation

        def read(stacks: dict[int, str]) -> None:
            if generation == self._generation:
                seen(stacks)

        def work() -> None:
            stacks: dict[int, str] = {}
            with contextlib.suppress(Exception):  # the loop waits for an answer, whatever is wrong
                stacks = self.placement.stacks()
            self._loop.call(read, stacks)

        threading.Thread(target=work, daemon=True).start()

    def disconnect(self) -> None:
        """Close the connections to the ranks, which then exit; nothing more is reported of them."""
        self._generation += 1
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._infos, self._failures, self._exits, self._closed = [], {}, {}, {}, set()
        self._hanging, self.loading_since = False, None

    def stop(self, code: int = 0) -> None:
        """Stop all ranks permanently; see `Placement.stop`."""
        self.disconnect()
        self.placement.stop(code)

    def _start(self, generation: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()

        def report(failure: Failure) -> None:
            self._loop.call(self._reported, generation, failure)

        try:
            self.placement.kill()
            channels = self.placement.start(self.spec, report)
        except InputError as error:
            self._loop.call(self._note, generation, Failure.of_rejection(InputRejected.from_error(error)))
        except Exception as error:  # no other code would report it
            rank, reason = -1, f"{type(error).__name__}: {error}"
            if isinstance(error, RankError):
                rank, reason = error.rank, error.reason
            self._loop.call(self._note, generation, Failure(f"the ranks could not be started: {reason}", rank=rank))
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
                lambda message: self._loop.call(self._receive, generation, rank, message),
                lambda: self._loop.call(self._disconnected, generation, rank),
            )

        self._pipes = [pipe(rank, channel) for rank, channel in enumerate(channels)]
        self.loading_since = time.monotonic()

    def _receive(self, generation: int, rank: int, message: Any) -> None:
        if generation != self._generation:
            return
        if isinstance(message, Ready):
            self._infos[rank] = message.info
            self.loading_since = time.monotonic() if self.loading else None
            if not self.loading:
                self._on_up([self._infos[number] for number in range(self.size)])
        elif isinstance(message, InputRejected):
            self._note(generation, Failure.of_rejection(message, rank))
        elif isinstance(message, Failed):
            self._note(generation, Failure(message.reason, Cause.PEER if message.of_peer else Cause.OWN, rank))
        else:
            self._on_message(rank, message)
            if isinstance(message, OutOfMemory):
                self._note(generation, Failure(f"out of memory: {message.reason}", rank=rank, memory=True))

    def _reported(self, generation: int, failure: Failure) -> None:
        """Handle the end of a process noticed by the placement."""
        if generation != self._generation:
            return
        if failure.rank < 0:
            self._note(generation, failure)
            return
        self._on_exit(failure.rank, failure.reason)
        self._exits[failure.rank] = failure
        if failure.rank in self._closed:
            self._note(generation, failure)
        else:  # its last messages come first; a process that it has started may keep the connection open
            self._loop.later(LAST_MESSAGE_DELAY_S, self._note, generation, failure)

    def _disconnected(self, generation: int, rank: int) -> None:
        if generation == self._generation:
            self._closed.add(rank)
            self._note(generation, self._exits.get(rank) or Failure("its connection has closed", Cause.CLOSED, rank))

    def _note(self, generation: int, failure: Failure) -> None:
        """Store a failure. A rank that has reported its error and then exits has failed once."""
        if generation != self._generation:
            return
        earlier = {known.cause for known in self._failures if known.rank == failure.rank >= 0}
        if (failure.cause is not Cause.CERTAIN and earlier - {Cause.CLOSED}) or failure.cause in earlier:
            return
        if earlier:  # the exit of a process is more informative than its closed connection
            self._failures = {known: due for known, due in self._failures.items() if known.rank != failure.rank}
        wait_s = self.timeouts.after(failure.cause)
        self._failures[failure] = time.monotonic() + wait_s
        if wait_s:
            self._loop.later(wait_s, self._report_root, generation)
        else:
            self._report_root(generation)

    def _report_root(self, generation: int) -> None:
        """Report the likely root, or find the rank that its peers gave up on."""
        if generation != self._generation or time.monotonic() < min(self._failures.values()):
            return
        root = root_of(self._failures)
        if self._hanging and root.cause is not Cause.CERTAIN:
            return
        silent = set(range(self.size)) - {failure.rank for failure in self._failures}
        if root.cause is Cause.PEER:
            root = self.explain() or root
        if root.cause is Cause.PEER and silent:
            self.hang("it hangs and its peers gave up", silent, replace(root, cause=Cause.CERTAIN))
            return
        self.disconnect()
        self._on_down(root)


def _hang(reason: str, stacks: dict[int, str], silent: list[int]) -> Failure:
    """Build the failure of silent ranks, with the place of each and the stack of the likely root."""
    rank = suspect(stacks, silent)
    stack = f"\nwhere it was:\n{stacks[rank].rstrip()}" if stacks.get(rank) else ""
    return Failure(f"{reason}; {described(stacks)}{stack}", rank=rank)
