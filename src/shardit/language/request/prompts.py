"""Conversion of users' prompts to rows of tokens, and of rows to groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from shardit.errors import InputError, did_you_mean
from shardit.language.request.rows import PromptRow
from shardit.language.request.sampling_params import SamplingParams
from shardit.params import seed_or_drawn
from shardit.settings.checks import TEXT

Prompt = str | Mapping[str, Any] | Sequence[int]
"""A text, {"prompt": text}, {"prompt_token_ids": ids}, or ids."""


_KEYS = ("prompt", "prompt_token_ids")


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return prompts as a list; a single prompt is also accepted."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, (bytes, bytearray)):
        raise InputError(f"prompts must be a text, a dict, ids or a list of them, got {prompts!r:.80}")
    if not prompts:
        raise InputError("the list of prompts is empty; give at least one prompt")
    if all(isinstance(one, int) for one in prompts):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]


def params_of_each(given: Any, count: int) -> list[SamplingParams]:
    """Return the parameters of each of `count` prompts. Raises InputError for any other number."""
    found = [given] * count if isinstance(given, SamplingParams) else list(given) if _is_list(given) else []
    if len(found) != count or not all(isinstance(one, SamplingParams) for one in found):
        raise InputError(f"sampling_params must be one SamplingParams, or one for each of the {count} prompts")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _check_keys(prompt: Mapping[str, Any]) -> None:
    for name in prompt:
        if name in _KEYS:
            continue
        if name in [item.name for item in fields(SamplingParams)]:
            raise InputError(f"a prompt takes no {name!r}: it is a field of SamplingParams, the second argument")
        raise InputError(f"a prompt takes no {name!r}{did_you_mean(str(name), _KEYS)}; it takes: {', '.join(_KEYS)}")


def tokens_of(prompt: Prompt, tokenizer: Any, vocabulary: int) -> tuple[str | None, tuple[int, ...]]:
    """Return the text of a prompt (None for token ids) and its tokens. vocabulary: the number of tokens in the model's
    vocabulary. Raises InputError for an invalid prompt."""
    if isinstance(prompt, Mapping):
        _check_keys(prompt)
        if len(prompt) > 1:
            raise InputError("a prompt is given twice, as prompt and as prompt_token_ids; give one of them")
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if isinstance(text, str):
        TEXT("prompt", text)
        found = tuple(tokenizer(text)["input_ids"])
        if beyond := next((one for one in found if one >= vocabulary), None):
            name = f"{tokenizer.convert_ids_to_tokens(beyond)!r}, token {beyond}"
            raise InputError(f"prompt has {name}, and the model knows those from 0 to {vocabulary - 1}")
        return text, found
    ids: Any = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else prompt
    wrong = isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Sequence) or not ids
    if wrong or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise InputError(f'a prompt is a text, {{"prompt": text}} or {{"prompt_token_ids": ids}}, got {prompt!r:.80}')
    tokens: tuple[int, ...] = tuple(ids)
    if not all(0 <= one < vocabulary for one in tokens):
        raise InputError(f"prompt_token_ids must be from 0 to {vocabulary - 1}, got {min(tokens)} to {max(tokens)}")
    return None, tokens


def check_tokens(params: SamplingParams, vocabulary: int) -> None:
    """Raise InputError for parameters that ask for more tokens, or others, than the model knows."""
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and count > vocabulary:
            raise InputError(f"{name}={count} is more than the {vocabulary} tokens that the model knows")
    if unknown := [one for one in params.logit_bias or () if one >= vocabulary]:
        raise InputError(f"logit_bias must have tokens from 0 to {vocabulary - 1}, got {unknown[0]}")
    if unknown := [one for one in params.stop_token_ids or () if one >= vocabulary]:
        raise InputError(f"stop_token_ids must be from 0 to {vocabulary - 1}, got {unknown[0]}")


def rows_of(
    number: int, tokens: tuple[int, ...], params: SamplingParams, limit: int | None, seed: int | None
) -> list[PromptRow]:
    """Return the rows of prompt `number`, one for each requested text. limit: maximum tokens of prompt and text. seed:
    of the first, if the parameters have none. Raises InputError if the prompt is too long."""
    if not tokens:
        raise InputError(f"prompt {number} has no tokens: give it a text that is not empty")
    left = None if limit is None else limit - len(tokens)
    if left is not None and left < 1:
        raise InputError(f"prompt {number} has {len(tokens)} tokens, and the model has room for {limit}")
    wanted = params.max_tokens or left
    if wanted is None:
        raise InputError("max_tokens must be given: the model states no limit")
    most = wanted if left is None else min(wanted, left)
    first = seed_or_drawn(seed if params.seed is None else params.seed)
    own = replace(params, max_tokens=most)
    others = replace(own, prompt_logprobs=None)  # the prompt is the same
    return [PromptRow(tokens, others if copy else own, first + copy) for copy in range(params.n)]
