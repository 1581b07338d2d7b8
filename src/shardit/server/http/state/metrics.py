"""Metrics of the HTTP side."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # as many lines again, only for the times of first use of the counters
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HttpMetrics:
    """Counters of one app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "shardit_http_requests", "Answered requests.", ("method", "route", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "shardit_http_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ("route",),
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800),
            registry=self._registry,
        )
        self.open = Gauge("shardit_http_open_requests", "Requests that are being answered.", registry=self._registry)

    def text(self) -> bytes:
        """Return the metrics in prometheus' text format."""
        return generate_latest(self._registry)
