"""The supervisor's metrics for Prometheus."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

if TYPE_CHECKING:
    from shardit.engine.process.messages import CacheUse, RequestFinished
    from shardit.server.jobs.job import Job, State
    from shardit.server.supervisor.running import RunningJob

disable_created_metrics()
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
_TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 1, 3, 10)


class SupervisorMetrics:
    """The supervisor's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def histogram(name: str, text: str, labels: tuple[str, ...] = (), buckets: Any = _SECONDS) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.queue = Gauge("shardit_queue_jobs", "Jobs that wait", registry=registry)
        self.in_flight = Gauge("shardit_in_flight_jobs", "Jobs that the ranks work on", registry=registry)
        self.slots = Gauge("shardit_slots", "Jobs that the ranks can work on at the same time", registry=registry)
        self.restarts = Counter("shardit_restarts", "Restarts of the ranks", registry=registry)
        self.api_restarts = Counter("shardit_api_restarts", "Restarts of the API process", registry=registry)
        self._jobs = Counter("shardit_jobs", "Jobs that have ended, by state", ("state",), registry=registry)
        self._steps = histogram("shardit_step_seconds", "Time between two steps of a job")
        self._phases = histogram("shardit_phase_seconds", "Time of a job in a phase", ("phase",))
        self._latency = histogram("shardit_job_seconds", "Time from acceptance to the end of a job", ("state",))
        self.first_token = histogram("shardit_first_token_seconds", "Time from acceptance to the first token of a text")
        self.token_seconds = histogram(
            "shardit_token_seconds", "Time between two tokens of a text", buckets=_TOKEN_SECONDS
        )
        self.tokens = Counter("shardit_tokens", "Tokens of texts", registry=registry)
        self.preemptions = Counter(
            "shardit_preemptions", "Times that a text gave up its cache for want of memory", registry=registry
        )
        self.prompt_tokens = Counter("shardit_prompt_tokens", "Tokens of prompts, for each text", registry=registry)
        self._hits = Counter(
            "shardit_prefix_hits", "Prompts that began with the keys of an ended text", registry=registry
        )
        self._reused = Counter(
            "shardit_prefix_tokens", "Tokens of prompts whose keys were not computed again", registry=registry
        )
        replica = ("replica",)
        self._cache = Gauge("shardit_cache_bytes", "Keys and values, on a rank with most", replica, registry=registry)
        self._cache_limit = Gauge("shardit_cache_limit_bytes", "Limit of these bytes", replica, registry=registry)
        self._cache_share = Gauge("shardit_cache_share", "Share of the limit in use", replica, registry=registry)
        self._memory = Gauge(
            "shardit_rank_peak_bytes", "Peak memory since the rank last had nothing to do", ("rank",), registry=registry
        )
        self._idle = Gauge(
            "shardit_rank_idle_share",
            "Share of its working time that a rank waited for messages, since its start",
            ("rank",),
            registry=registry,
        )

    def step(self, seconds: float) -> None:
        """Count a finished step and the seconds since the previous one."""
        self._steps.observe(seconds)

    def rank(self, rank: int, left: RequestFinished) -> None:
        """Record the peak memory and the idle share of a rank after a job."""
        if left.peak_bytes:
            self._memory.labels(rank).set(left.peak_bytes)
        if left.busy_s > 0:
            self._idle.labels(rank).set(min(1.0, left.waited_s / left.busy_s))

    def caches(self, replica: int, use: CacheUse) -> None:
        """Record the caches of a replica."""
        self._cache.labels(replica).set(use.bytes)
        if use.limit is not None:
            self._cache_limit.labels(replica).set(use.limit)
            self._cache_share.labels(replica).set(use.bytes / max(use.limit, 1))
        self._hits.inc(use.hits)
        self._reused.inc(use.reused_tokens)

    def no_caches(self) -> None:
        """Record that all caches are gone."""
        for gauge in (self._cache, self._cache_limit, self._cache_share):
            gauge.clear()

    def phases(self, running: RunningJob) -> None:
        """Record the phases of a computed job."""
        if running.first_step is None or running.denoised is None:
            return  # a pipeline without steps
        self._phases.labels("encode").observe(running.first_step - running.begun)
        self._phases.labels("denoise").observe(running.denoised - running.first_step)
        self._phases.labels("decode").observe(time.monotonic() - running.denoised)

    def ended(self, job: Job, state: State) -> None:
        """Count an ended job."""
        self._jobs.labels(state).inc()
        self._latency.labels(state).observe(max(0.0, time.time() - job.created_at))

    def cancelled_waiting(self, count: int) -> None:
        """Count more jobs that were cancelled while queued."""
        self._jobs.labels("cancelled").inc(count)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
