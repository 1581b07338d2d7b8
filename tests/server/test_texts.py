"""Decisions about text jobs with ranks played by the test: tokens, restarts, ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.engine.process.failure import Failure
from shardit.engine.process.messages import BatchStep, Begin, CacheUse, OutOfMemory, Progress, RequestFinished
from shardit.language.info import LanguageInfo
from shardit.language.request.outputs import GroupOutput
from shardit.language.request.sampling_params import SamplingParams
from shardit.language.request.structured_outputs import StructuredOutputsParams
from shardit.server.jobs.job import NewJob
from shardit.server.jobs.text_request import group_of, results_of, stored_request
from shardit.server.messages import StepTokens, Tokens
from tests.support import played
from tests.support.played import Server, played_server

INFO = LanguageInfo(64, 258)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(played, "INFO", INFO)
    with played_server(tmp_path, pipeline_parallel_size=2) as made:
        yield made


def put(server: Server, n: int = 1) -> str:
    request = stored_request([[5, 6]], SamplingParams(n=n, max_tokens=8), [3], 64)
    job_id = server.store.accept(NewJob("text", request, 3, 0.0, waits=True), queue_size=1000)[0].id
    server.jobs.wake()
    return job_id


def make(server: Server, job_id: str, *made: int | None, step: int = 1, logprobs: Any = None) -> None:
    server.jobs.on_rank_message(0, Progress(server.key(job_id), step, 8, made, logprobs))


RESULT = ((7, 8), "length", None, [{7: -0.5}, {8: -1.0}])


def end(server: Server, job_id: str, **more: Any) -> None:
    key = server.key(job_id)
    request: Any = server.jobs.running[key].request
    for rank in server.ranks(job_id):
        output = GroupOutput([RESULT for _ in request.rows]) if rank == 0 and not more else None
        server.jobs.on_rank_message(rank, RequestFinished(key, "sum", output=output, **more))


def tokens(server: Server) -> list[tuple[int | None, ...]]:
    return [message.made for message in server.told if isinstance(message, Tokens)]


def begun(server: Server) -> Any:
    return [message for _, message in server.rank_group.sent if isinstance(message, Begin)][-1].load()


def test_a_stored_request_is_the_same_each_time() -> None:
    params = SamplingParams(n=2, max_tokens=None, stop=["a", "b"], stop_token_ids=[3], logprobs=2, temperature=0.5)
    stored = stored_request([[1, 2], [3]], params, [10, 20], 64)
    group = group_of(stored)
    assert group == group_of(stored)
    assert [(row.prompt, row.seed, row.params.max_tokens) for row in group.rows] == [
        ((1, 2), 10, 62),
        ((1, 2), 11, 62),
        ((3,), 20, 63),
        ((3,), 21, 63),
    ]
    assert group.rows[0].params.stops == ("a", "b")
    assert group.rows[0].params.logprobs == 2


def test_a_stored_form_is_the_same() -> None:
    for form in ({"json": {"const": None, "maximum": 1.5}}, {"choice": ["a", "b"]}, {"json_object": True}):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
        stored = json.loads(json.dumps(stored_request([[1]], params, [1], 64)))
        found = group_of(stored).rows[0].params.structured_outputs
        assert found is not None
        assert found.given == form


def test_texts_of_a_grammar_that_fails(server: Server) -> None:
    job_id, other = put(server), put(server)
    key = server.key(job_id)
    for rank in server.ranks(job_id):
        output = GroupOutput(error="the grammar became too complex") if rank == 0 else None
        server.jobs.on_rank_message(rank, RequestFinished(key, "sum", output=output))
    assert server.state(job_id) == "failed"
    assert server.job(job_id).error == {"code": "generation_failed", "message": "the grammar became too complex"}
    assert server.state(other) == "in_progress"


def test_tokens_are_passed_on(server: Server) -> None:
    job_id = put(server, n=2)
    make(server, job_id, 7, 8)
    make(server, job_id, None, 9)
    make(server, job_id, None, None)
    assert tokens(server) == [(7, 8), (None, 9)]
    end(server, job_id)
    assert server.state(job_id) == "completed"
    assert results_of(server.job(job_id).details) == [RESULT, RESULT]
    assert server.log.ends() == [(job_id, "completed")]


def test_the_tokens_of_a_step_are_one_message(server: Server) -> None:
    one, other = put(server), put(server)
    before = len(server.told)
    steps = (Progress(server.key(one), 1, 8, (7,)), Progress(server.key(other), 1, 8, (8,)), Progress(999, 1, 8, (9,)))
    server.jobs.on_rank_message(0, BatchStep(steps))
    assert server.told[before:] == [StepTokens((Tokens(one, (7,)), Tokens(other, (8,))))]
    server.die()
    assert [row.made for row in begun(server).rows] == [(8,)]
    server.jobs.on_rank_message(0, BatchStep((Progress(999, 1, 8, (9,)),)))  # of a job that has ended meanwhile
    end(server, one)
    end(server, other)
    assert server.state(one) == server.state(other) == "completed"


def test_a_restart_repeats_no_token(server: Server) -> None:
    """Ranks continue behind the tokens that they are given; the log probabilities of these are not lost."""
    job_id = put(server, n=2)
    make(server, job_id, 7, 8, logprobs=({7: -1.0}, {8: -2.0}))
    make(server, job_id, None, 9, logprobs=(None, {9: -3.0}))
    server.die()
    assert server.state(job_id) == "in_progress"
    assert [row.made for row in begun(server).rows] == [(7,), (8, 9)]
    make(server, job_id, None, 10, logprobs=(None, {10: -4.0}))
    make(server, job_id, None, 11, logprobs=(None, {11: -5.0}))
    assert tokens(server) == [(7, 8), (None, 9), (None, 10), (None, 11)]
    server.die()
    assert [row.made for row in begun(server).rows] == [(7,), (8, 9, 10, 11)]
    made = GroupOutput([((7,), "length", None, None), ((8, 9, 10, 11, 12), "length", None, [{12: -6.0}])])
    found = server.jobs.texts.whole(job_id, made).rows
    assert found[1][3] == [{8: -2.0}, {9: -3.0}, {10: -4.0}, {11: -5.0}, {12: -6.0}]
    end(server, job_id)
    assert not server.jobs.texts._texts


def test_log_probabilities_survive_a_restart(server: Server) -> None:
    """Ranks that continue behind tokens know only those of the tokens that they have made."""
    job_id = put(server)
    make(server, job_id, 6, logprobs=({6: -0.1},))
    assert [told.logprobs for told in server.told if isinstance(told, Tokens)] == [({6: -0.1},)]
    server.die()
    rows = [((6, 7, 8), "length", None, [{7: -0.5}, {8: -1.0}])]
    whole = server.jobs.texts.whole(job_id, GroupOutput(rows))
    assert whole.rows == [((6, 7, 8), "length", None, [{6: -0.1}, {7: -0.5}, {8: -1.0}])]
    assert server.jobs.texts.whole(job_id, GroupOutput([((6,), "stop", None, None)])).rows[0][3] == [{6: -0.1}]


def test_a_text_that_is_cancelled_without_ranks(server: Server) -> None:
    job_id = put(server)
    make(server, job_id, 7)
    server.store.delete(job_id)
    server.die()
    assert server.store.get(job_id) is None
    server.jobs.wake()
    assert not server.jobs.texts._texts


def test_errors_and_cancels(server: Server) -> None:
    failed, cancelled = put(server), put(server)
    end(server, failed, error="it is wrong")
    assert server.job(failed).error == {"code": "generation_failed", "message": "it is wrong"}
    server.store.request_cancel(cancelled)
    server.jobs.wake()
    assert server.cancels() == {server.key(cancelled)}
    end(server, cancelled, cancelled=True)
    assert server.state(cancelled) == "cancelled"


def out_of_memory(server: Server, job_id: str) -> None:
    server.jobs.on_rank_message(0, OutOfMemory(server.key(job_id), "tried to allocate 9 GiB"))
    server.jobs.down(Failure("rank 0 ran out of memory", memory=True))
    server.jobs.ready([INFO] * server.rank_group.size)


def test_the_text_that_uses_up_the_memory_is_found(server: Server) -> None:
    """Beside others it runs alone after two times, and fails by name; the others go on."""
    large, *others = [put(server) for _ in range(4)]
    for number in range(3):
        assert (server.running() == [large]) == (number == 2)
        out_of_memory(server, large)
    assert server.job(large).error == {
        "code": "out_of_memory",
        "message": "out of memory (2 tokens of prompts): tried to allocate 9 GiB; ask for fewer tokens or fewer texts",
    }
    assert server.running()
    assert large not in server.running()
    assert all(server.job(one).deaths == 0 for one in others)


def test_metrics_of_caches(server: Server) -> None:
    put(server)
    server.jobs.on_rank_message(0, CacheUse(50, 200, hits=1, reused_tokens=40))
    server.jobs.on_rank_message(0, CacheUse(20, 200, hits=2, reused_tokens=64))
    shown = server.jobs.metrics.text().decode()
    for line in (
        'shardit_cache_bytes{replica="0"} 20.0',
        'shardit_cache_limit_bytes{replica="0"} 200.0',
        'shardit_cache_share{replica="0"} 0.1',
        "shardit_prefix_hits_total 3.0",
        "shardit_prefix_tokens_total 104.0",
        "shardit_prompt_tokens_total 2.0",
    ):
        assert f"{line}\n" in shown
    server.die()
    shown = server.jobs.metrics.text().decode()
    assert "shardit_cache_bytes{" not in shown
    assert "shardit_prompt_tokens_total 2.0" in shown  # the text goes on, and counts once


def test_metrics(server: Server) -> None:
    job_id = put(server, n=2)
    for _ in range(3):
        make(server, job_id, 7, 8)
    shown = server.jobs.metrics.text().decode()
    assert "shardit_first_token_seconds_count 1.0" in shown
    assert "shardit_token_seconds_count 2.0" in shown
    assert "shardit_tokens_total 6.0" in shown
