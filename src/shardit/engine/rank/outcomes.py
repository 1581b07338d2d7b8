"""Reports the outcome of requests to the user's process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardit.engine.process.channel import Channel
from shardit.engine.process.memory import peak_bytes
from shardit.engine.process.messages import Progress, RequestFailed, RequestFinished


@dataclass(frozen=True)
class ReceivedRequest:
    """A received request; begun: time of its start in the rounds, by `perf_counter`."""

    key: int
    request: Any
    request_id: str = ""
    begun: float = 0.0


@dataclass
class Outcomes:
    """busy_s: returns the seconds since the start of the rank with requests in flight. log: of the rank."""

    session: Any
    channel: Channel
    busy_s: Callable[[], float]
    log: Any

    def progress(self, key: int, step: int, total: int, made: Any = None) -> None:
        """Report a step of a request, from the first rank."""
        if self.session.leads:
            self.channel.send(Progress(key, step, total, made))

    def rejected(self, key: int, text: str) -> None:
        """Report a request that this rank cannot read."""
        self.channel.send(RequestFinished(key=key, start=None, error=text, rejected=True))

    def cancelled_waiting(self, key: int) -> None:
        """Report a request that was cancelled before it began."""
        self.channel.send(RequestFinished(key=key, start=None, cancelled=True))

    def failed(self, received: ReceivedRequest, error: Exception, start: str | None = None) -> None:
        """Report a request that must have failed on all ranks: they compare the outcome, or wait."""
        text = self.session.model.error_text(received.request, error)
        # Before the comparison: if it fails on this rank alone, the others may never come to compare.
        self.channel.send(RequestFailed(received.key, text))
        self.session.agree((received.key, type(error).__name__), f"here: {error!r}")
        self.ended(received, start, None, error=text)

    def ended(
        self, one: ReceivedRequest, start: str | None, value: Any, *, error: str | None = None, cancelled: bool = False
    ) -> None:
        """Report a request that has ended, by its value, by an error or cancelled. start: see `RequestFinished`."""
        output = None
        if self.session.leads and not cancelled:
            output = self.session.model.collect(one.request, value, error)
        self.channel.send(
            RequestFinished(
                key=one.key,
                start=start,
                cancelled=cancelled,
                error=error,
                output=output,
                peak_bytes=peak_bytes(),
                busy_s=self.busy_s(),
                waited_s=self.session.waited_s,
            )
        )
        if self.session.spec.of_server:
            self.log.info(
                "request_finished",
                request_id=one.request_id,
                how="cancelled" if cancelled else error or "completed",
                seconds=round(time.perf_counter() - one.begun, 3),
                peak_bytes=peak_bytes(),
            )
