"""Code of users inside `generate`: criteria, processors, streamers and assistants. Ranks act alike, and fail alike."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor, WatermarkLogitsProcessor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.group import GroupCoordinator
from shardit.core.decoder.decoder_stages import DecoderStages
from shardit.core.decoder.stage_tensor import held_as, materialized
from shardit.core.runtime.digests import digests
from shardit.core.stages.runtime import Runtime
from shardit.errors import RankError, first_line

TOKEN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)
"""Stopping criteria that read only tokens, which all ranks have."""


def alike(group: GroupCoordinator, kind: str, function: Callable[[], Any]) -> Any:
    """Return the result of a function of a user. If it fails on any rank, all ranks raise: those that failed their own
    error, the others a RankError. kind: the function in the text of that."""
    value, error = None, None
    try:
        value = function()
    except Exception as failed:
        error = failed
    failures = group.gather_bytes(bytes([error is not None]))
    if not any(map(any, failures)):
        return value
    reasons = group.gather_objects(None if error is None else f"{type(error).__name__}: {first_line(error)}")
    if error is not None:
        raise error
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
    raise RankError(rank, f"{kind} failed: {reason}")


def criteria_member(cls: Any, stages: DecoderStages | None, runtime: Runtime) -> Callable[..., Any]:
    """Return the method of a model that makes the stopping criteria of a call of `generate`."""
    own = cls._get_stopping_criteria
    neighbours = Collectives(runtime.mesh.axes["tp"]) if "tp" in runtime.mesh.axes else None

    @functools.wraps(own)
    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = own(self, *args, **kwargs)
        if neighbours is None and _read_only_tokens(criteria):
            return criteria
        return FirstRankCriteria(criteria, runtime, stages, neighbours)

    return _get_stopping_criteria


def _read_only_tokens(criteria: StoppingCriteriaList) -> bool:
    return all(isinstance(one, TOKEN_CRITERIA) or getattr(one, "of_tokens", False) for one in criteria)


class FirstRankCriteria(StoppingCriteriaList):
    """Criteria that may read a clock or count their calls: all ranks use the decision of the first. Tensor ranks, which
    all choose tokens, use those of the first. A criterion of a user that fails on one rank fails on all."""

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        runtime: Runtime,
        stages: DecoderStages | None,
        neighbours: Collectives | None = None,
    ):
        super().__init__(criteria)
        self._of_tokens = _read_only_tokens(criteria)
        self._exchange = None if stages is None else stages.exchange
        self._neighbours = neighbours
        self._compared = None if all(map(_is_of_transformers, criteria)) else runtime.replica.group

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each sequence is done."""
        if self._neighbours is not None:
            input_ids[:, -1] = self._neighbours.of_first(input_ids[:, -1])
        if self._compared is None:
            done = super().__call__(input_ids, scores, **kwargs)
        else:
            own = functools.partial(super().__call__, input_ids, materialized(scores), **kwargs)
            done = alike(self._compared, "a stopping criterion", own)
        if self._of_tokens:
            return done
        if self._neighbours is not None:
            done = self._neighbours.of_first(done.to(input_ids.dtype)).bool()
        return done if self._exchange is None else self._exchange.share(done, frozenset((0,)))


def _is_of_transformers(one: Any) -> bool:
    return type(one).__module__.startswith("transformers.")


def processors_member(cls: Any, runtime: Runtime) -> Callable[..., Any]:
    """Return the method of a model that makes the logits processors of a call of `generate`."""
    own = cls._get_logits_processor

    @functools.wraps(own)
    def _get_logits_processor(self: Any, *args: Any, **kwargs: Any) -> Any:
        processors = own(self, *args, **kwargs)
        return AlikeProcessors(processors, runtime) if any(map(_needs_scores, processors)) else processors

    return _get_logits_processor


def _needs_scores(processor: Any) -> bool:
    """Return whether a processor runs code of a user's, or reads scores in ways that only plain tensors have."""
    return not _is_of_transformers(processor) or isinstance(
        processor, (PrefixConstrainedLogitsProcessor, WatermarkLogitsProcessor)
    )


class AlikeProcessors(LogitsProcessorList):
    """Logits processors. One that needs the scores gets them on all ranks, so it waits for none of them, and if it
    fails on one rank, it fails on all. The ranks that have the logits use their own result."""

    def __init__(self, processors: LogitsProcessorList, runtime: Runtime):
        super().__init__(processors)
        self._group = runtime.replica.group

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return the processed scores."""
        for processor in self:
            own = functools.partial(LogitsProcessorList([processor]), input_ids, **kwargs)
            scores = self._of_all(own, scores) if _needs_scores(processor) else own(scores=scores)
        return scores

    def _of_all(self, own: Callable[..., Any], scores: Any) -> Any:
        plain = materialized(scores)
        made = alike(self._group, "a logits processor", lambda: own(scores=plain))
        return made if plain is scores else held_as(scores, made.clone())


class AlikeStreamer(BaseStreamer):
    """A streamer that gives its text on the first rank. If it fails there, all ranks fail."""

    def __init__(self, streamer: Any, runtime: Runtime):
        self._group = runtime.replica.group
        self._own = streamer if runtime.mesh.rank == 0 else _silent(streamer)

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens."""
        alike(self._group, "a streamer", lambda: None if self._own is None else self._own.put(value))

    def end(self) -> None:
        """Take the end of the text."""
        alike(self._group, "a streamer", lambda: None if self._own is None else self._own.end())


def _silent(streamer: Any) -> Any:
    """Return a streamer for the other ranks, which refuses the same calls and gives no text; one that is iterated ends.
    None for a streamer of another kind than those of transformers."""
    give = getattr(streamer, "on_finalized_text", None)
    if give is None:
        return None
    quiet, iterated = copy.copy(streamer), hasattr(streamer, "text_queue")
    quiet.token_cache = []

    def on_finalized_text(text: str, stream_end: bool = False) -> None:
        if stream_end and iterated:
            give("", stream_end=True)

    quiet.on_finalized_text = on_finalized_text
    return quiet


def candidates_member(cls: Any, runtime: Runtime) -> Callable[..., Any]:
    """Return the method of a model that makes the generator of candidates for assisted decoding. Each rank runs the
    assistant; if ranks got other candidates (on other hardware, say), all take those of the first."""
    own, group = cls._get_candidate_generator, runtime.replica.group

    @functools.wraps(own)
    def _get_candidate_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = alike(group, "the assistant", lambda: own(self, *args, **kwargs))
        propose = found.get_candidates

        @functools.wraps(propose)
        def get_candidates(*args: Any, **kwargs: Any) -> Any:
            return _of_first(group, alike(group, "the assistant", lambda: propose(*args, **kwargs)))

        found.get_candidates = get_candidates
        return found

    return _get_candidate_generator


def _of_first(group: GroupCoordinator, candidates: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return the first rank's candidates and their logits."""
    mine = b"".join(digests(dict(zip(("ids", "logits"), candidates, strict=True))).values())
    return candidates if len(set(group.gather_bytes(mine))) == 1 else group.broadcast_object(candidates)
