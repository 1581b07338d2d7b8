"""Requests are log lines, except those that probes and the page repeat all the time."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.support.http_fake import WAIT_S, Served, serving

POLLS = ("/health", "/ready", "/metrics", "/v1/server", "/v1/images", "/v1/videos", "/v1/generations")


def logged(served: Served, last: str) -> list[tuple[str, str, int]]:
    """The requests in the log, once it has the one of the path `last`."""
    end = time.monotonic() + WAIT_S
    while f'"path": "{last}"' not in (text := served.log.read_text()):
        assert time.monotonic() < end, text
        time.sleep(0.02)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [(one["method"], one["path"], one["status"]) for one in lines if one["event"] == "request"]


def test_polls_are_not_logged(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        for path in POLLS:
            assert served.call("GET", path)[0] == 200
        assert served.call("POST", "/v1/images/generations", {"prompt": 1})[0] == 400
        assert served.call("GET", "/v1/videos/last")[0] == 404
        found = logged(served, "/v1/videos/last")
    assert found == [("POST", "/v1/images/generations", 400), ("GET", "/v1/videos/last", 404)]


def test_polls_that_fail_are_logged(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert served.call("GET", "/v1/server", headers={"Host": "example.org"})[0] == 403
        assert logged(served, "/v1/server") == [("GET", "/v1/server", 403)]
