"""Tokens of text jobs while they run. They outlive the ranks: after a restart a text continues behind its tokens."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from shardit.engine.process.messages import Progress
from shardit.language.request.outputs import GroupOutput
from shardit.language.request.rows import PromptGroup
from shardit.server.jobs.job import Job
from shardit.server.jobs.text_request import group_of
from shardit.server.messages import Tokens


@dataclasses.dataclass
class _Text:
    made: list[list[int]]
    """Tokens of each row."""
    logprobs: list[list[dict[int, float]]]
    """Of each of these tokens, if they were requested."""
    last: float | None = None
    """Time of its newest token, by the monotonic clock."""


class Texts:
    """The tokens of all text jobs that run or have lost their ranks. metrics: as of `SupervisorMetrics`."""

    def __init__(self, metrics: Any):
        self._metrics = metrics
        self._texts: dict[str, _Text] = {}

    def request(self, job: Job) -> PromptGroup:
        """Return the request for the ranks, with the tokens that the job has already."""
        group = group_of(job.request)
        known = self._texts.get(job.id)
        made, logprobs = [list[int]() for _ in group.rows], [list[dict[int, float]]() for _ in group.rows]
        if known is not None:
            made, logprobs = known.made, known.logprobs
        else:
            self._metrics.prompt_tokens.inc(sum(len(row.prompt) for row in group.rows))
        self._texts[job.id] = _Text(made, logprobs)
        rows = [dataclasses.replace(row, made=tuple(own)) for row, own in zip(group.rows, made, strict=True)]
        return dataclasses.replace(group, rows=tuple(rows))

    def progress(self, job: Job, message: Progress) -> Tokens | None:
        """Record a step; return the message for the API process, None for a step without new tokens."""
        text = self._texts[job.id]
        count = sum(token is not None for token in message.made)
        if not count:
            return None
        self._measure(job, text, count)
        for row, token in enumerate(message.made):
            if token is not None:
                text.made[row].append(token)
            if token is not None and message.logprobs is not None and message.logprobs[row] is not None:
                text.logprobs[row].append(message.logprobs[row])
        return Tokens(job.id, message.made, message.logprobs)

    def _measure(self, job: Job, text: _Text, count: int) -> None:
        now = time.monotonic()
        if text.last is not None:
            self._metrics.token_seconds.observe(now - text.last)
        elif not any(text.made):
            self._metrics.first_token.observe(max(0.0, time.time() - job.created_at))
        text.last = now
        self._metrics.tokens.inc(count)

    def whole(self, job_id: str, output: GroupOutput) -> GroupOutput:
        """Return an output with the log probabilities of all tokens, also those that earlier ranks have made."""
        rows = []
        for (tokens, reason, stop, values), kept in zip(output.rows, self._texts[job_id].logprobs, strict=True):
            missing = len(tokens) - len(values or ())
            rows.append((tokens, reason, stop, [*kept[:missing], *(values or ())] if kept and missing > 0 else values))
        return dataclasses.replace(output, rows=rows)

    def forget(self, job_id: str) -> None:
        """Release the tokens of a job that has ended."""
        self._texts.pop(job_id, None)

    def keep(self, job_ids: set[str]) -> None:
        """Release the tokens of all other jobs, which have ended while they had no ranks."""
        for job_id in self._texts.keys() - job_ids:
            del self._texts[job_id]
