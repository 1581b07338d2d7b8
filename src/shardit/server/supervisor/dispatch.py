"""Assigns queued jobs to replicas and handles their outcome; runs in the supervisor's loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from shardit.diffusion.request.model_info import ModelInfo
from shardit.engine.process.channel import Packed, send_all
from shardit.engine.process.failure import Failure
from shardit.engine.process.hangs import HangDetector, slowdown
from shardit.engine.process.in_flight import InFlight
from shardit.engine.process.loop import Loop
from shardit.engine.process.messages import BatchStep, Begin, CacheUse, Cancel, OutOfMemory, Progress, RequestFinished
from shardit.engine.process.rank_group import RankGroup
from shardit.errors import InputError
from shardit.language.info import LanguageInfo
from shardit.language.request.outputs import GroupOutput
from shardit.language.request.rows import PromptGroup
from shardit.server.estimate import Work
from shardit.server.jobs.job import Job
from shardit.server.jobs.store import Store
from shardit.server.jobs.text_request import stored_results
from shardit.server.messages import Changed, StepDone, StepTokens, Tokens
from shardit.server.options import ServeOptions
from shardit.server.supervisor.cost_history import CostHistory
from shardit.server.supervisor.finish import JobFinisher, failure
from shardit.server.supervisor.model_jobs import PipelineJobs, TextJobs, jobs_of_model
from shardit.server.supervisor.prefetch import Prefetcher
from shardit.server.supervisor.running import RunningJob, Size, in_flight
from shardit.server.supervisor.silence_limit import SilenceLimit
from shardit.server.supervisor.texts import Texts

SUSPECT_AFTER = 2
"""Number of deaths of ranks during a job after which it runs alone, to find out whether it is the cause."""
MAX_WRITING = 8
"""Number of results waiting to be written above which no more jobs begin: they are held in memory."""


class Dispatcher:
    """Takes jobs from the store, assigns them to replicas, and finishes them.

    notify: sends a message to the API process. slots: number of jobs that one replica runs at the same time.
    """

    def __init__(
        self,
        options: ServeOptions,
        store: Store,
        rank_group: RankGroup,
        loop: Loop,
        writers: Executor,
        notify: Callable[[Any], None],
        log: Any,
        metrics: Any,
    ):
        self.options, self.store, self.rank_group, self.loop = options, store, rank_group, loop
        self.notify, self.log, self.metrics = notify, log, metrics
        self.slots = 1
        self.cost_history = CostHistory(store, options)
        self.kind: PipelineJobs | TextJobs | None = None
        self.running: dict[int, RunningJob] = {}
        self.finisher = JobFinisher(store, loop, writers, notify, log, metrics)
        self.prefetcher = Prefetcher(store, loop, then=self.fill)
        self.texts = Texts(metrics)
        self.peaks: dict[int, int] = {}
        """Peak memory of each rank during its newest job, in bytes."""
        self._keys = itertools.count(1)
        self._most: dict[int, int] = {}  # by replica: pixels in flight at most, since it last had none
        self._replicas = options.config.data_parallel_size
        self._ranks_per_replica = rank_group.size // self._replicas
        self.silence_limit = SilenceLimit(options.step_timeout_s)
        self.hang_detector = HangDetector(
            rank_group,
            lambda: [running.on_ranks for running in self.running.values()],
            lambda replica: slowdown() * self.silence_limit.bound(self._sizes(replica)),
            rank_group.timeouts.probe_s,
        )

    # Events.

    def ready(self, infos: Sequence[ModelInfo | LanguageInfo]) -> None:
        """All ranks have loaded; `infos` by rank."""
        self.kind = jobs_of_model(infos[0], self.prefetcher, self.texts)
        self.hang_detector.reset()
        self.silence_limit.cold = True
        self.cost_history.record_idle_memory(infos)
        self.fill()

    def fill(self) -> None:
        """Begin jobs while there are free slots."""
        with self.finisher.tolerant():
            while self._begin_next():
                pass

    def wake(self) -> None:
        """Handle a change in the store: a new job, or one that is to be cancelled."""
        with self.finisher.tolerant():
            wanted = set(self.store.to_cancel())
            for key, running in self.running.items():
                if running.job.id in wanted and not running.cancelling:
                    running.cancelling = True
                    send_all(self.rank_group.pipes(running.on_ranks.ranks), Cancel(key))
        self.fill()

    def on_rank_message(self, rank: int, message: Any) -> None:
        """Handle a message of a rank about a job, or about its caches."""
        if isinstance(message, CacheUse):
            self.metrics.caches(rank // self._ranks_per_replica, message)
            return
        if isinstance(message, BatchStep):
            self._batch_step(message)
            return
        running = self.running.get(message.key)
        if running is None:
            return
        self._record_message(running.replica)
        if isinstance(message, Progress):
            self._progress(running, message)
        elif isinstance(message, OutOfMemory):
            running.used_up_memory = True
            if not isinstance(running.request, PromptGroup):
                self.cost_history.out_of_memory(self._pixels_in_flight(running.replica))
            if running.jobs_at_start == len(self._in_flight(running.replica)) == 1:
                self.running.pop(message.key)
                text = self._too_large(running, message.reason)
                self.finisher.end(running.job, "failed", error=failure("out_of_memory", text))
        else:
            running.on_ranks.record(rank, message)
            if isinstance(message, RequestFinished):
                self.peaks[rank] = message.peak_bytes or self.peaks.get(rank, 0)
                self.metrics.rank(rank, message)
            if (outcomes := running.on_ranks.difference()) is not None:
                self.rank_group.fail(f"ranks disagree on the outcome of {running.job.id}: {outcomes}")
            elif running.on_ranks.complete:
                self._finished(message.key, running)

    def _batch_step(self, step: BatchStep) -> None:
        """Handle the progress of all texts of a batch at once: it comes often."""
        known = [(self.running[one.key], one) for one in step.of if one.key in self.running]
        if not known:
            return
        self._record_message(known[0][0].replica)
        tokens = [self._tokens(running, one) for running, one in known]
        self.notify(StepTokens(tuple(one for one in tokens if one is not None)))
        if any(running.leaving for running, _ in known):
            self.fill()

    def _record_message(self, replica: int) -> None:
        silence = self.hang_detector.record_message(replica)
        for size in {one.size for one in self._in_flight(replica)}:
            self.silence_limit.record(size, silence)

    def down(self, why: Failure) -> None:
        """Handle the loss of the ranks: queue their jobs again."""
        self.kind = None
        self.metrics.no_caches()
        alone = self.in_flight == 1
        for running in self.running.values():
            # Fewer texts at a time do not help as with images: the one that is too large has to be found.
            died = not why.memory or (running.used_up_memory and isinstance(running.request, PromptGroup))
            self.finisher.retry_or_fail(running.job, why.text, died=died and not running.ahead, alone=alone)
        self.running.clear()

    def check(self) -> None:
        """Find unreported problems: hanging ranks, lost messages, a disk with free space again. To be called a few
        times per second."""
        with self.finisher.tolerant():
            self.cost_history.save()
        self.finisher.retry_writes()
        self.find_lost()
        self.wake()
        self.hang_detector.check()

    def find_lost(self) -> None:
        """Queue jobs again that are in progress but not on any rank: only a bug can have lost them."""
        if not self.finisher.all_written:
            return  # their outcome is known
        with self.finisher.tolerant():
            known = {running.job.id for running in self.running.values()} | self.finisher.writing.keys()
            for job in self.store.in_progress():
                if job.id not in known:
                    self.log.error("job_lost", request_id=job.id)
                    reason = "internal error: the log of the server has the details"
                    self.finisher.retry_or_fail(job, reason, died=True, alone=not self.running)

    def requeue_all(self) -> None:
        """Queue running jobs again when the server stops, and begin no more."""
        self.kind = None
        for running in self.running.values():
            self.finisher.requeue(running.job)
        self.running.clear()

    @property
    def in_flight(self) -> int:
        """Jobs that have a slot."""
        return sum(not running.ahead for running in self.running.values())

    def _sizes(self, replica: int) -> list[Size]:
        """Return the sizes of the jobs that take turns. Texts of one size are computed in one batch."""
        sizes = [one.size for one in self._in_flight(replica)]
        return list(dict.fromkeys(sizes)) if self.kind is not None and self.kind.batched else sizes

    def _in_flight(self, replica: int) -> list[RunningJob]:
        return in_flight(self.running, replica)

    def _begin_next(self) -> bool:
        if self.kind is None or self.rank_group.failing or len(self.finisher.writing) >= MAX_WRITING:
            return False
        job = next(iter(self.store.queued(1)), None)
        if job is None:
            self.prefetcher.forget()
            self.texts.keep({running.job.id for running in self.running.values()})
            return False
        # While it waits for a slot, too.
        if not self.kind.ready(job) or self._must_be_alone(job) or (replica := self._free_replica(job)) is None:
            return False
        if self.store.start(job.id):
            self._begin(replace(job, state="in_progress", attempts=job.attempts + 1), replica)
        return True

    def _must_be_alone(self, job: Job) -> bool:
        """Return whether a job has to wait because it, or a running one, may be what kills ranks: all of them would
        die."""
        others = [running.job for running in self.running.values()]
        return bool(others) and any(one.deaths >= SUSPECT_AFTER for one in (job, *others))

    def _free_replica(self, job: Job) -> int | None:
        """Return a replica with memory for the job and a slot that is free or, if none is, will be soon: the ranks then
        have the next job in time."""
        taken, staying = [0] * self._replicas, [0] * self._replicas
        for running in self.running.values():
            taken[running.replica] += not running.ahead
            staying[running.replica] += not running.leaving
        best_first = sorted(range(self._replicas), key=lambda replica: (taken[replica], staying[replica]))
        free = (replica for replica in best_first if staying[replica] < self.slots and self._fits(job, replica))
        return next(free, None)

    def _fits(self, job: Job, replica: int) -> bool:
        """Return whether the memory suffices for a job next to those that it will overlap with on the replica, in
        whatever order they finish. A job without others is tried in any case."""
        here = [running for running in self.running.values() if running.replica == replica]
        ending = max(0, len(here) + 1 - self.slots)
        gone = sorted(running.work.size for running in here if running.leaving)[:ending]
        others = sum(running.work.size for running in here) - sum(gone)
        try:
            return others == 0 or self.cost_history.fits(others + self._work(job).size)
        except (ValueError, TypeError):
            return True  # `_begin` will report the error

    def _pixels_in_flight(self, replica: int) -> int:
        return sum(running.work.size for running in self._in_flight(replica))

    def _work(self, job: Job) -> Work:
        assert self.kind is not None
        return self.kind.work(job)

    def _begin(self, job: Job, replica: int) -> None:
        assert self.kind is not None
        try:
            request = self.kind.request(job)
            work = self._work(job)
        except Exception as error:  # accepted for another model, or its files are gone
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            self.finisher.end(job, "failed", error=failure("invalid_request", text))
            return
        key = next(self._keys)
        count = len(self._in_flight(replica))
        ahead = count >= self.slots
        ranks = range(replica * self._ranks_per_replica, (replica + 1) * self._ranks_per_replica)
        self.running[key] = RunningJob(job, request, InFlight(replica, ranks), count + (not ahead), work, ahead=ahead)
        if not ahead:
            self._enters(replica)
        send_all(self.rank_group.pipes(ranks), Begin(key, Packed.of(request), job.id))
        self.log.info("job_started", request_id=job.id, replica=replica, attempt=job.attempts)
        self.notify(Changed(job.id))

    def _enters(self, replica: int) -> None:
        """Record that a job has got a slot."""
        first = len(self._in_flight(replica)) == 1
        self._most[replica] = max(self._pixels_in_flight(replica), 0 if first else self._most[replica])
        if first:
            self.hang_detector.begins(replica)

    def _enters_next(self, replica: int) -> None:
        """Record that a slot is free: the ranks give it to the first of the jobs sent ahead."""
        sent = (running for running in self.running.values() if running.replica == replica and running.ahead)
        if (running := next(sent, None)) is not None and len(self._in_flight(replica)) < self.slots:
            running.enters()
            self._enters(replica)

    def _progress(self, running: RunningJob, message: Progress) -> None:
        if message.made is not None:
            if (tokens := self._tokens(running, message)) is not None:
                self.notify(tokens)
            if running.leaving:
                self.fill()
            return
        took = running.progress(message.step, message.total)
        if took is not None:
            self.metrics.step(took)
        phase = "denoise" if message.step < message.total else "decode"
        self.notify(StepDone(running.job.id, message.step, message.total, phase, running.seconds_per_step))
        if running.leaving:
            self.fill()

    def _tokens(self, running: RunningJob, message: Progress) -> Tokens | None:
        running.progress(message.step, message.total)
        return self.texts.progress(running.job, message)

    def _finished(self, key: int, running: RunningJob) -> None:
        together = self._most[running.replica]
        del self.running[key]
        first = running.on_ranks.first
        output, error = first.output, first.error
        if isinstance(output, GroupOutput) and (error := error or output.error) is None:
            output = self.texts.whole(running.job.id, output)
        self.texts.forget(running.job.id)
        self._enters_next(running.replica)
        self.fill()  # the ranks continue while the result is written
        if first.cancelled:
            self.finisher.end(running.job, "cancelled")
        elif error is not None:
            self.finisher.end(running.job, "failed", error=failure("generation_failed", error))
        elif isinstance(output, GroupOutput):
            self.finisher.end(running.job, "completed", details=stored_results(output))
            self.metrics.preemptions.inc(output.preemptions)
            self.silence_limit.completed(running.size)
        else:
            peaks = {rank: end.peak_bytes for rank, end in running.on_ranks.finished.items()}
            self.finisher.write(running.job, output, peaks, then=self.fill)
            self.silence_limit.completed(running.size)
            self.metrics.phases(running)
            self.cost_history.completed(running.work, time.monotonic() - running.begun, together, max(peaks.values()))

    def _too_large(self, running: RunningJob, reason: str) -> str:
        if isinstance(running.request, PromptGroup):
            tokens = sum(len(row.prompt) for row in running.request.rows)
            return f"out of memory ({tokens} tokens of prompts): {reason}; ask for fewer tokens or fewer texts"
        asked = {name: running.request.kwargs.get(name) for name in ("width", "height", "num_frames")}
        size = ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None)
        return f"out of memory ({size or 'default size'}): {reason}; ask for a smaller size or fewer outputs"
