"""Last known state of the ranks and jobs, and the requests that wait for changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shardit.diffusion.request.model_info import ModelInfo
from shardit.language.info import LanguageInfo
from shardit.server.messages import Changed, Measured, Ranks, Scrape, StepDone, StepTokens, Tokens, Wake

Info = ModelInfo | LanguageInfo
"""Facts about a model."""


class JobWatch:
    """Wakes a request that waits for changes of one job; for its `steps` and tokens only if asked for."""

    def __init__(self, steps: bool) -> None:
        self.steps = steps
        self._notified = False
        self._waiting: asyncio.Future[None] | None = None
        self._tokens: list[Tokens] = []
        self._changed = False

    async def wait(self, timeout_s: float) -> None:
        """Return at the next change, at once if there was one since the last call, or after `timeout_s`."""
        if not self._notified:
            # For each token of each text: `asyncio.wait_for` would make a task.
            loop = asyncio.get_running_loop()
            self._waiting = loop.create_future()
            timer = loop.call_later(timeout_s, self.notify)  # a lost message would report a change
            try:
                await self._waiting
            finally:
                timer.cancel()
                self._waiting = None
        self._notified = False

    def notify(self, tokens: Tokens | None = None, *, step: bool = False) -> None:
        """Signal a change, a step or new tokens."""
        if tokens is not None:
            self._tokens.append(tokens)
        self._changed = self._changed or not (step or tokens)
        self._notified = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def taken(self) -> list[Tokens]:
        """Return the tokens that have come since the last call."""
        taken, self._tokens = self._tokens, []
        return taken

    def changed(self) -> bool:
        """Return whether the stored state of the job may have changed since the last call."""
        changed, self._changed = self._changed, False
        return changed


class LiveState:
    """Belongs to one event loop: all methods but `wake` are called there.

    send: sends a message to the supervisor. on_info: called with the model facts when the ranks report them. read_info:
    reads the same facts from files, as far as possible, before the model is loaded; it runs in a thread.
    """

    def __init__(
        self,
        send: Callable[[object], None],
        *,
        info: Info | None = None,
        on_info: Callable[[Info], None] | None = None,
        read_info: Callable[[], Info | None] | None = None,
    ):
        self.ranks = Ranks("loading")
        self.info = info
        """Signatures and notes of the model, from these ranks, from earlier ones or from its files; else None."""
        self._send = send
        self._on_info = on_info
        self._read_info = read_info
        self._reading: asyncio.Future[Info | None] | None = None
        self._steps: dict[str, StepDone] = {}
        self._watches: dict[str, set[JobWatch]] = {}
        self._scrapes: set[asyncio.Future[bytes]] = set()
        self._loaded = asyncio.Event()

    def deliver(self, message: object) -> None:
        """Handle a message from the supervisor."""
        if isinstance(message, StepDone):
            self._steps[message.job_id] = message
            self._notify(message.job_id, step=True)
        elif isinstance(message, (Tokens, StepTokens)):
            for tokens in message.of if isinstance(message, StepTokens) else (message,):
                for watch in self._watches.get(tokens.job_id, ()):
                    if watch.steps:
                        watch.notify(tokens)
        elif isinstance(message, Changed):
            self._steps.pop(message.job_id, None)  # it has begun, ended or been put back: its steps are out of date
            self._notify(message.job_id)
        elif isinstance(message, Ranks):
            self._on_ranks(message)
        elif isinstance(message, Measured):
            for waiting in self._scrapes:
                if not waiting.done():
                    waiting.set_result(message.text)

    @property
    def stopping(self) -> bool:
        """Whether the server is about to stop."""
        return self.ranks.state == "stopping"

    async def known(self) -> Info | None:
        """Return `info`, read from the files of the model if no ranks have loaded it yet."""
        if self.info is None and self._read_info is not None:
            if self._reading is None:
                self._reading = asyncio.get_running_loop().run_in_executor(None, self._read_info)
            found = await asyncio.shield(self._reading)
            self.info = self.info or found  # the ranks may have been faster, and know more
        return self.info

    async def loaded(self) -> Info | None:
        """Return `info` once it is known, from the ranks at the latest; None if the server is about to stop before."""
        if (info := await self.known()) is None:
            await self._loaded.wait()
            info = self.info
        return info

    def step(self, job_id: str) -> StepDone | None:
        """Return the last step of a job in progress."""
        return self._steps.get(job_id)

    def wake(self) -> None:
        """Ask the supervisor to look into the store; from any thread."""
        self._send(Wake())

    @contextmanager
    def watching(self, job_id: str, *, steps: bool) -> Iterator[JobWatch]:
        """Watch a job from now on; its steps too if asked for."""
        watch = JobWatch(steps)
        self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._watches[job_id]
            watches.discard(watch)
            if not watches:
                del self._watches[job_id]

    def mark_changed(self, job_id: str) -> None:
        """Note that this process itself has changed the job in the store."""
        self._notify(job_id)
        self.wake()

    async def measured(self, timeout_s: float = 1.0) -> bytes | None:
        """Return the supervisor's metrics; None if it does not answer in time."""
        waiting: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._scrapes.add(waiting)
        self._send(Scrape())
        try:
            return await asyncio.wait_for(waiting, timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            return None
        finally:
            self._scrapes.discard(waiting)

    def stop(self) -> None:
        """Note that the process is about to exit, and wake all waiting requests."""
        if not self.stopping:
            self._on_ranks(Ranks("stopping", ranks=self.ranks.ranks, restarts=self.ranks.restarts))

    def _on_ranks(self, ranks: Ranks) -> None:
        another, self.ranks = ranks.state != self.ranks.state, ranks
        if ranks.info is not None and ranks.info != self.info:
            self.info = ranks.info
            if self._on_info is not None:
                self._on_info(ranks.info)
        if self.info is not None or self.stopping:
            self._loaded.set()
        for job_id in list(self._watches) if another else ():  # new peaks of memory do not concern jobs
            self._notify(job_id)

    def _notify(self, job_id: str, *, step: bool = False) -> None:
        for watch in self._watches.get(job_id, ()):
            if watch.steps or not step:
                watch.notify(step=step)
