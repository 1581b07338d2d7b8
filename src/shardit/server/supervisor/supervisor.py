"""The supervisor: the process of `shardit serve`, which keeps the API process and the ranks running until it receives a
signal to stop."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sqlite3
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shardit.engine.process.failure import Failure
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import SESSION, SessionSpec
from shardit.engine.process.placement import Placement
from shardit.engine.process.process import lower_priority
from shardit.engine.process.rank_group import RankGroup
from shardit.errors import InputError, RankError
from shardit.logs import logger
from shardit.server.jobs.store import CANCELLED_WAITING, Store
from shardit.server.messages import Measured, Ranks, RanksState, Scrape, Wake
from shardit.server.options import ServeOptions
from shardit.server.process.api_process import ApiProcess, StartedApiProcess
from shardit.server.process.forced_exit import ForcedExit, exit_code
from shardit.server.supervisor.dispatch import Dispatcher
from shardit.server.supervisor.metrics import SupervisorMetrics
from shardit.server.supervisor.silence_limit import TIMES_SLOWEST

LOAD_TIMEOUT_S = 3600.0
_MODEL = "model"
"""Name in the store for the model of its jobs."""
MAX_DELAY_S = 30.0
MAX_FIRST_STARTS = 5
"""Starts of ranks that have never been up, before the server gives up; later on it keeps trying."""
STOP_TIMEOUT_S = 7.0
RANK_TIMEOUT_MARGIN_S = 15.0
"""Extra seconds before ranks give up on each other, later than the supervisor, which can report more of the cause."""
RETENTION_INTERVAL_S = 60.0
RETAIN_AT_MOST = 20
"""Number of jobs deleted at a time: files are removed in the loop, which must not block."""


class Supervisor:
    """Owns the processes, the store and the jobs, and handles their events."""

    _session = SESSION

    def __init__(self, options: ServeOptions, api: StartedApiProcess, listener: socket.socket, placement: Placement):
        self.options = options
        self.log = logger("supervisor")
        self.metrics = SupervisorMetrics()
        self.loop = Loop(self.tick, on_error=self.on_error)
        self.store = Store(options.data_dir)
        self.listener = listener
        self.slots = options.max_in_flight or useful_slots(options)
        spec = spec_of(options, self.slots, self._session)
        self.rank_group = RankGroup(
            spec,
            placement,
            self.loop,
            on_up=self.on_up,
            on_down=self.on_down,
            on_message=self.on_rank_message,
            on_exit=lambda rank, how: self.log.info("rank_ended", rank=rank, how=how),
        )
        self.api = ApiProcess(
            options, api, listener, self.loop, on_message=self.on_api_message, on_start=self.on_api_start, log=self.log
        )
        self.writers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="writer", initializer=lower_priority)
        self.jobs = Dispatcher(
            options, self.store, self.rank_group, self.loop, self.writers, self.api.send, self.log, self.metrics
        )
        self.jobs.slots = self.slots
        self.state = Ranks("loading")
        self.error: InputError | RankError | None = None
        self.code = 0
        self.asked_to_stop = False
        self._started = time.monotonic()
        self._was_up = False
        self._failed_starts = 0
        self._delay_s = 0.0
        self._start_ranks_at: float | None = None
        self._retain_at = 0.0
        self._api_starts = 0
        self._cancelled = self.store.recall(CANCELLED_WAITING, 0)

    def run(self) -> int:
        """Serve until a signal arrives; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self.loop.call(self.stop, number))
        self._check_model()
        forced_exit = ForcedExit(self.log)
        self.store.recover()
        repeat = self.store.to_repeat()
        new = self.store.to_run() - repeat
        host, port = self.listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self.log.info("serving", url=url, model=self.options.model, jobs_to_repeat=repeat, jobs_waiting=new)
        if not self.options.api_key_hashes and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            self.log.warning("open_to_all", reason="other machines can use it without a key; --api-key sets one")
        if self.options.api_key_hashes and (hidden := self.store.without_owner()):
            reason = "they were sent without a key, so no key sees them; they run; start without keys to see them"
            self.log.warning("hidden_jobs", jobs=hidden, reason=reason)
        try:
            self.api.start()
            self.rank_group.bring_up()
            self.loop.run()
        finally:
            self.end()
            forced_exit.disarm()
        if self.error is not None:
            raise self.error
        return self.code

    def _check_model(self) -> None:
        """Raise InputError if jobs wait for another model: they would get its images."""
        before, (plain, changes) = self.store.recall(_MODEL), self.options.served
        model = plain + (f" with {changes}" if changes else "")
        waiting = self.store.to_run()
        if waiting and before not in (None, model):
            what = f"the data folder {self.options.data_dir} holds {waiting} unfinished job{'s' * (waiting > 1)} of"
            if str(before).partition(" with ")[0] != plain:
                raise InputError(f"{what} {before}; serve that, or choose another folder with --data-dir")
            earlier = str(before).partition(" with ")[2] or "no options of the model"
            raise InputError(
                f"{what} {plain} as served with {earlier}, now it is {changes or 'none'}; serve it as before, or "
                "choose another folder with --data-dir"
            )
        if before != model:
            self.store.remember(_MODEL, model)

    # Events.

    def tick(self) -> None:
        """Check for unreported events."""
        self.api.check()
        if self.api.unable:
            self.error = InputError("the server cannot start: a package is missing or broken, see the line before")
            self.loop.stop()
        self.jobs.check()
        if self._of_ranks() != self.state.ranks:
            self._set(self.state.state, reason=self.state.reason)
        now = time.monotonic()
        loads = self.state.state in ("loading", "restarting") and self._start_ranks_at is None
        if loads and now - self._started > LOAD_TIMEOUT_S:
            self.rank_group.fail(f"not loaded after {LOAD_TIMEOUT_S:.0f} s")
        if self._start_ranks_at is not None and now >= self._start_ranks_at:
            self._start_ranks_at = None
            self.rank_group.bring_up()
        if now >= self._retain_at:
            self._retain_at = now + RETENTION_INTERVAL_S
            gone = self.store.retain(self.options.keep_days * 86400, self.options.keep_bytes, RETAIN_AT_MOST)
            if len(gone) == RETAIN_AT_MOST:
                self._retain_at = now

    def on_up(self, infos: list[Any]) -> None:
        """Handle ranks that have loaded."""
        self._was_up, self._delay_s = True, 0.0
        self.log.info("ranks_ready", seconds=round(time.monotonic() - self._started, 3))
        self._set("ready", info=infos[0])
        self.jobs.ready(infos)

    def on_down(self, down: Failure) -> None:
        """Restart all ranks after a failure; after a growing pause if they never come up."""
        self._failed_starts += not self._was_up
        if not self._was_up and (down.rejection or self._failed_starts == MAX_FIRST_STARTS):
            text = f"the start of the ranks failed {MAX_FIRST_STARTS} times, the last time: {down.text.splitlines()[0]}"
            self.error = InputError(down.reason) if down.rejection else RankError(-1, text)
            self.loop.stop()
            return
        came_up = self.state.state == "ready"
        self.log.error("ranks_down", reason=down.text)
        self.metrics.restarts.inc()
        self._started = time.monotonic()
        self._set("restarting", reason=down.text.splitlines()[0], restarts=self.state.restarts + 1)
        self.jobs.down(down)
        self._delay_s = 0.0 if came_up else min(MAX_DELAY_S, 2 * self._delay_s + 1.0)
        self._start_ranks_at = time.monotonic() + self._delay_s
        if not self._delay_s:
            self.tick()

    def on_rank_message(self, rank: int, message: Any) -> None:
        """Handle a message of a rank about a job."""
        self.jobs.on_rank_message(rank, message)

    def on_api_start(self) -> None:
        """Send the state to a new API process."""
        self._api_starts += 1
        if self._api_starts > 1:
            self.metrics.api_restarts.inc()
        self.api.send(self.state)

    def on_error(self, error: Exception) -> None:
        """Handle an error in the loop, which continues."""
        expected = isinstance(error, (OSError, sqlite3.Error))
        text = str(error) if expected else "".join(traceback.format_exception(error))
        self.log.error("error", error=text, expected=expected)

    def on_api_message(self, message: Any) -> None:
        """Handle a message of the API process."""
        if isinstance(message, Wake):
            self.jobs.wake()
        elif isinstance(message, Scrape):
            cancelled, self._cancelled = self._cancelled, self.store.recall(CANCELLED_WAITING, 0)
            self.metrics.cancelled_waiting(self._cancelled - cancelled)
            self.metrics.queue.set(self.store.counts().get("queued", 0))
            self.metrics.in_flight.set(self.jobs.in_flight)
            self.metrics.slots.set(self.jobs.slots * self.options.config.data_parallel_size)
            self.api.send(Measured(self.metrics.text()))

    # The end.

    def stop(self, number: int) -> None:
        """Accept no more jobs, queue running ones again, and stop. A second signal changes nothing."""
        if self.asked_to_stop:
            return
        self.code = exit_code(number)
        self.asked_to_stop = True
        self.log.info("stopping", signal=signal.Signals(number).name)
        self._set("stopping", reason="the server stops")
        self.loop.stop()

    def end(self) -> None:
        """Stop all processes, within ten seconds. Part of this time is left for results that are being written."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self.api.terminate()
        self.rank_group.stop(0 if self.asked_to_stop else 2 if isinstance(self.error, InputError) else 1)
        self.api.stop()  # before a write to the store, which a stopped process may have locked
        self.jobs.requeue_all()
        while self.jobs.finisher.writing and time.monotonic() < deadline:
            self.loop.step(0.1)
        self.writers.shutdown(wait=False, cancel_futures=True)
        self.store.close()
        if writing := self.jobs.finisher.writing:  # Python would wait for these threads; their jobs run again
            self.log.warning("results_not_written", jobs=list(writing))
            os._exit(self.code)

    def _of_ranks(self) -> tuple[dict[str, Any], ...]:
        peaks = self.jobs.peaks
        return tuple(
            {"rank": rank, "state": state, "peak_bytes": peaks.get(rank)}
            for rank, state in enumerate(self.rank_group.states)
        )

    def _set(self, state: RanksState, **more: Any) -> None:
        kept = {"info": self.state.info, "restarts": self.state.restarts, "ranks": self._of_ranks()}
        self.state = Ranks(state, **{**kept, **more})
        self.api.send(self.state)


def spec_of(options: ServeOptions, slots: int, session: str) -> SessionSpec:
    """Return the settings with which the ranks start."""
    return SessionSpec(
        model=options.model,
        config=options.config,
        dtype=options.dtype,
        device=options.device,
        max_in_flight=options.config.pipeline_parallel_size if options.of_language else slots,
        timeout_s=TIMES_SLOWEST * options.step_timeout_s + RANK_TIMEOUT_MARGIN_S,  # `HangDetector` decides first
        task=options.task,
        session=session,
        attention_backend=options.attention_backend,
        language=options.language,
        options=options.loading,
        of_server=True,
    )


def useful_slots(options: ServeOptions) -> int:
    """Return the number of requests at a time beyond which a replica gets no faster: one per stage, or two if messages
    of one can be sent while another computes. Of texts, a batch per stage."""
    config = options.config
    if options.of_language:
        return config.pipeline_parallel_size * options.language.max_num_seqs
    if config.pipeline_parallel_size > 1:
        return max(2, config.pipeline_parallel_size)
    return 2 if config.world_size > config.data_parallel_size * config.cfg_parallel_size else 1
