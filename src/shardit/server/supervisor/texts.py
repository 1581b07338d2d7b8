"""Tokens of text jobs while they run. They outlive the ranks: after a restart a text continues behind its tokens."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from shardit.engine.process.messages import Progress
from shardit.language.request.outputs import GroupOutput
from shardit.language.request.rows import PromptGroup, Row
from shardit.server.jobs.job import Job
from shardit.server.jobs.text_request import group_of
from shardit.server.messages import Tokens

_CONTINUES = "made" in {item.name for item in dataclasses.fields(Row)}
"""Whether ranks continue rows behind tokens that they are given. If not, they make these again, with the same seeds."""


@dataclasses.dataclass
class _Text:
    made: list[list[int]]
    """Tokens of each row."""
    repeated: list[int]
    """For each row, how many of its tokens the ranks make again."""
    logprobs: list[list[dict[int, float]]]
    """Log probabilities of the tokens of each row, as far as ranks send them step by step."""
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
        made = known.made if known is not None else [[] for _ in group.rows]
        repeated = [0 if _CONTINUES else len(row) for row in made]
        logprobs = known.logprobs if known is not None else [[] for _ in group.rows]
        self._texts[job.id] = _Text(made, repeated, logprobs)
        return dataclasses.replace(group, rows=tuple(map(_with_tokens, group.rows, made)))

    def progress(self, job: Job, message: Progress) -> Tokens | None:
        """Record a step; return the message for the API process, None for a step without new tokens."""
        text = self._texts[job.id]
        new = [self._is_new(text, row, token) for row, token in enumerate(message.made)]
        if not any(new):
            return None
        tokens = tuple(token if one else None for token, one in zip(message.made, new, strict=True))
        self._measure(job, text, sum(new))
        logprobs = getattr(message, "logprobs", None)
        for row, token in enumerate(tokens):
            if token is not None:
                text.made[row].append(token)
                if logprobs is not None and logprobs[row] is not None:
                    text.logprobs[row].append(logprobs[row])
        return Tokens(job.id, tokens, logprobs)

    def whole(self, job_id: str, output: GroupOutput) -> GroupOutput:
        """Return the output of a job with the log probabilities of tokens that ranks before a restart have made."""
        rows = []
        for (tokens, reason, stop, values), kept in zip(output.rows, self._texts[job_id].logprobs, strict=True):
            missing = len(tokens) - len(values or ())
            rows.append((tokens, reason, stop, [*kept[:missing], *(values or ())] if kept and missing > 0 else values))
        return dataclasses.replace(output, rows=rows)

    def _is_new(self, text: _Text, row: int, token: int | None) -> bool:
        if token is None:
            return False
        if text.repeated[row]:
            text.repeated[row] -= 1
            return False
        return True

    def _measure(self, job: Job, text: _Text, count: int) -> None:
        now = time.monotonic()
        if text.last is not None:
            self._metrics.token_seconds.observe(now - text.last)
        elif not any(text.made):
            self._metrics.first_token.observe(max(0.0, time.time() - job.created_at))
        text.last = now
        self._metrics.tokens.inc(count)

    def forget(self, job_id: str) -> None:
        """Release the tokens of a job that has ended."""
        self._texts.pop(job_id, None)

    def keep(self, job_ids: set[str]) -> None:
        """Release the tokens of all other jobs, which have ended while they had no ranks."""
        for job_id in self._texts.keys() - job_ids:
            del self._texts[job_id]


def _with_tokens(row: Row, made: list[int]) -> Row:
    more: dict[str, Any] = {"made": tuple(made)} if _CONTINUES and made else {}
    return dataclasses.replace(row, **more)
