"""Text jobs over HTTP: the queue and its limits, keys, clients that leave, a model that is being loaded."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardit.models.tiny.language import language_folder
from shardit.server.keys import digest
from shardit.server.messages import Ranks
from tests.support.http_calls import error_of
from tests.support.http_fake import WAIT_S, Served
from tests.support.text_fake import INFO, ask, chunks, joined, served_texts

BODY = {"prompt": "a", "max_tokens": 3}


def opened(served: Served, body: dict[str, Any], key: str = "") -> http.client.HTTPConnection:
    """A connection whose request has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=WAIT_S)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def until(served: Served, **counts: int) -> None:
    """Wait until the store has so many jobs of each state."""
    end = time.monotonic() + WAIT_S
    while served.store.counts() != counts:
        assert time.monotonic() < end, served.store.counts()
        time.sleep(0.01)


def test_a_full_queue(tmp_path: Path) -> None:
    with served_texts(tmp_path / "data", held=True, queue_size=2) as served:
        waiting = [opened(served, {**BODY, "stream": stream}) for stream in (False, True)]
        until(served, queued=2)
        for stream in (False, True):
            status, answer, headers = served.call("POST", "/v1/completions", {**BODY, "stream": stream})
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
        for one in waiting:
            one.close()
        until(served)  # both are gone at once


def test_open_jobs_of_a_key(tmp_path: Path) -> None:
    from shardit.server.options import RequestLimits

    hashes = tuple(map(digest, ("alpha", "beta")))
    with served_texts(
        tmp_path / "data", held=True, api_key_hashes=hashes, limits=RequestLimits(jobs_per_key=1)
    ) as served:
        assert error_of(served, "/v1/completions", BODY, 401)["code"] == "invalid_api_key"
        first = opened(served, BODY, "alpha")
        until(served, queued=1)
        error = error_of(served, "/v1/completions", BODY, 429, {"Authorization": "Bearer alpha"})
        assert error["message"].startswith("this key has 1 jobs open")
        second = opened(served, BODY, "beta")
        until(served, queued=2)
        served.supervisor.held = False
        for one in (first, second):
            assert json.loads(one.getresponse().read())["choices"][0]["text"] == "aaa"
        until(served)


def test_a_client_that_leaves(tmp_path: Path) -> None:
    with served_texts(tmp_path / "data") as served:
        for stream in (False, True):
            connection = opened(served, {"prompt": "slow", "max_tokens": 60, "stream": stream})
            if stream:
                assert connection.getresponse().read(10)
            until(served, in_progress=1)
            began = time.monotonic()
            connection.close()
            if connection.sock is not None:
                connection.sock.close()
            until(served)
            assert time.monotonic() - began < 1.5  # the text takes three seconds


def test_a_stream_that_waits_shows_that_it_lives(tmp_path: Path) -> None:
    with served_texts(tmp_path / "data", held=True) as served:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(ask(served, prompt="a", max_tokens=2, stream=True)))
        thread.start()
        until(served, queued=1)
        time.sleep(0.2)
        served.supervisor.held = False
        thread.join(WAIT_S)
        assert joined(chunks(found[0][1])) == ("<u", "length")


def test_news_may_be_lost(tmp_path: Path) -> None:
    """Each side also looks into the store."""
    with served_texts(tmp_path / "data") as served:
        served.supervisor.lossy = True
        assert ask(served, "completions", **BODY)[1]["choices"][0]["text"] == "aaa"


def test_a_model_that_is_being_loaded(tmp_path: Path) -> None:
    """Its files say what it takes, so that requests wait; if they do not, they are sent again."""
    with served_texts(tmp_path / "data", state="loading") as served:
        assert ask(served, "completions", **BODY)[1]["choices"][0]["text"] == "aaa"
        assert "room for 512" in ask(served, "completions", prompt="a" * 512)[1]["error"]["message"]
        assert served.call("GET", "/v1/server")[1]["kind"] == "text"
    with served_texts(tmp_path / "data", state="ready") as served:
        assert f"room for {INFO.max_model_len}" in ask(served, "completions", prompt="a" * 512)[1]["error"]["message"]
    with served_texts(tmp_path / "data", state="loading") as served:  # it is remembered
        assert f"room for {INFO.max_model_len}" in ask(served, "completions", prompt="a" * 512)[1]["error"]["message"]


def test_requests_wait_until_the_model_is_known(tmp_path: Path) -> None:
    """The files of some models do not say what they take, as GGUF files."""
    folder = tmp_path / "model"
    found = language_folder("tiny/llama")
    assert found is not None
    shutil.copytree(found, folder)
    (folder / "generation_config.json").unlink()
    with served_texts(tmp_path / "data", state="loading", model=str(folder)) as served:
        connection, stream = opened(served, BODY), opened(served, {**BODY, "stream": True})
        connection.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)
        served.supervisor.tell(Ranks("ready", info=INFO))  # type: ignore[arg-type]
        connection.sock.settimeout(30)
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == "aaa"
        assert joined(chunks(stream.getresponse().read())) == ("aaa", "length")
    with served_texts(tmp_path / "other", state="loading", model=str(folder)) as served:
        connection = opened(served, BODY)
        time.sleep(0.3)
        served.process.terminate()
        assert connection.getresponse().status == 503


def test_a_server_that_stops(tmp_path: Path) -> None:
    with served_texts(tmp_path / "data", held=True) as served:
        connection = opened(served, BODY)
        stream = opened(served, {**BODY, "stream": True})
        until(served, queued=2)
        served.process.terminate()
        assert connection.getresponse().status == 503
        assert b'"code": "stopping"' in stream.getresponse().read()
    with served_texts(tmp_path / "data", held=True) as served:
        until(served)  # nobody waits for them
