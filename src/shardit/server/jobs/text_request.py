"""The stored form of a request for texts, and of their tokens: JSON values that stay the same over restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from shardit.language.request.outputs import GroupOutput, RowResult
from shardit.language.request.prompts import rows_of
from shardit.language.request.rows import PromptGroup, PromptRow
from shardit.language.request.sampling_params import SamplingParams


def stored_request(
    prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int], limit: int | None
) -> dict[str, Any]:
    """Return the request of a job. prompts: tokens of each. seeds: of the first text of each prompt. limit: maximum
    tokens of a prompt and its text together."""
    standard = SamplingParams()
    given = {
        item.name: getattr(params, item.name)
        for item in dataclasses.fields(params)
        if getattr(params, item.name) != getattr(standard, item.name) and item.name != "seed"
    }
    if params.structured_outputs is not None:
        given["structured_outputs"] = params.structured_outputs.given
    return {"prompts": [list(one) for one in prompts], "params": given, "seeds": list(seeds), "limit": limit}


def rows_of_prompts(request: Mapping[str, Any]) -> list[tuple[int, int, PromptRow]]:
    """Return for each text of a stored request: the number of its prompt, its number among the texts of that prompt,
    and its row. Raises InputError if a prompt is too long or empty."""
    given = dict(request["params"])
    if given.get("logit_bias"):
        given["logit_bias"] = _by_number(given["logit_bias"])  # names of JSON objects are texts
    params = SamplingParams(**given)
    return [
        (number, copy, row)
        for number, (tokens, seed) in enumerate(zip(request["prompts"], request["seeds"], strict=True))
        for copy, row in enumerate(rows_of(number, tuple(tokens), params, request["limit"], seed))
    ]


def group_of(request: Mapping[str, Any]) -> PromptGroup:
    """Return the request for the ranks."""
    return PromptGroup(tuple(row for *_, row in rows_of_prompts(request)))


def stored_results(output: GroupOutput) -> dict[str, Any]:
    """Return the details of a finished job."""
    found = {"rows": [list(row) for row in output.rows], "seconds": output.seconds}
    return {**found, "prompt_logprobs": list(output.prompt_logprobs)} if any(output.prompt_logprobs) else found


def results_of(details: Mapping[str, Any]) -> list[RowResult]:
    """Return the results of the rows from the details of a finished job."""
    return [
        (tuple(tokens), reason, stop, None if logprobs is None else [_by_number(one) for one in logprobs])
        for tokens, reason, stop, logprobs in details["rows"]
    ]


def prompt_logprobs_of(details: Mapping[str, Any]) -> list[list[dict[int, float]] | None]:
    """Return for each row the log probabilities of the tokens of its prompt from the second on, None if there are
    none."""
    found = details.get("prompt_logprobs") or [None] * len(details["rows"])
    return [None if values is None else [_by_number(one) for one in values] for values in found]


def _by_number(logprobs: Mapping[str, float]) -> dict[int, float]:
    return {int(token): value for token, value in logprobs.items()}
