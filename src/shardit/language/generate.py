"""Calls and `generate` of a causal language model over ranks: every rank runs the same code of transformers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.group import GroupCoordinator
from shardit.core.decoder.stage_tensor import materialized
from shardit.core.decoder.stages import DecoderStages
from shardit.core.runtime.digests import named
from shardit.core.stages.runtime import Runtime
from shardit.errors import RankError, UnsupportedError, first_line
from shardit.parallel.tensor.check.units import Checks

TOKEN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria)
"""Stopping criteria that read only tokens, which all ranks have."""

FROM_BLOCKS = ("output_attentions", "output_router_logits")
"""Outputs that transformers collects inside blocks, so only on their owners."""


def members_of(model: Any, stages: DecoderStages | None, runtime: Runtime) -> dict[str, Callable[..., Any]]:
    """Return the methods of a model over stages or tensor ranks."""
    cls = type(model)
    members = {
        "__call__": call_member(cls, stages, runtime),
        "generate": _generate_member(cls, runtime),
        "_get_stopping_criteria": _stopping_criteria_member(cls, stages, runtime),
    }
    if "tp" in runtime.mesh.axes:  # keys are allocated at the first update, since a rank has only some heads
        members["_get_static_cache_init_shape"] = lambda self, *args, **kwargs: None
    return members


def call_member(
    cls: type, stages: DecoderStages | None, runtime: Runtime, checks: Checks | None = None
) -> Callable[..., Any]:
    """Return the `__call__` of a model, or of the headless model inside it; called directly, it returns plain tensors.
    checks: of the slices of the enclosing model."""
    own_call: Any = cls.__call__

    @functools.wraps(own_call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in FROM_BLOCKS:
            if kwargs.get(name) or (name not in kwargs and getattr(self.config, name, False)):
                raise UnsupportedError(f"{name}: the layers of {cls.__name__} lie on several ranks; use one rank")
        alone = not runtime.in_pipeline
        with runtime.pipeline_call(cls.__name__, lambda: named(own_call, args, kwargs)), torch.no_grad():
            try:
                with checks.begin(args, kwargs) if alone and checks is not None else nullcontext():
                    out = own_call(self, *args, **kwargs)
            finally:
                if stages is not None:
                    stages.end_call()
            return _plain(out) if alone else out

    return __call__


def _generate_member(cls: Any, runtime: Runtime) -> Callable[..., Any]:
    own_generate = cls.generate

    @functools.wraps(own_generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name):
                raise UnsupportedError(f"{name}: assisted decoding does not run over several ranks; leave it out")
        streamer = kwargs.pop("streamer", None)

        def compared() -> dict[str, Any]:
            found = {"model.generation_config": self.generation_config, **named(own_generate, args, kwargs)}
            return {
                name: value.to_dict() if isinstance(value, GenerationConfig) else value for name, value in found.items()
            }

        with runtime.pipeline_call(f"{cls.__name__}.generate", compared):
            if streamer is not None:  # one rank prints
                kwargs["streamer"] = streamer if runtime.mesh.rank == 0 else silent(streamer)
            return _plain(own_generate(self, *args, **kwargs))

    return generate


def silent(streamer: Any) -> Any:
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


def _stopping_criteria_member(cls: Any, stages: DecoderStages | None, runtime: Runtime) -> Callable[..., Any]:
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
        self._link = None if stages is None else stages.link
        self._neighbours = neighbours
        known = all(type(one).__module__.startswith("transformers.") for one in criteria)
        self._compared = None if known else runtime.replica.group

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each sequence is done."""
        if self._neighbours is not None:
            input_ids[:, -1] = self._neighbours.of_first(input_ids[:, -1])
        if self._compared is None:
            done = super().__call__(input_ids, scores, **kwargs)
        else:
            done = alike(self._compared, lambda: super(FirstRankCriteria, self).__call__(input_ids, scores, **kwargs))
        if self._of_tokens:
            return done
        if self._neighbours is not None:
            done = self._neighbours.of_first(done.to(input_ids.dtype)).bool()
        return done if self._link is None else self._link.share(done, frozenset((0,)))


def alike(group: GroupCoordinator, function: Callable[[], Any]) -> Any:
    """Return the result of a function of a user. If it fails on any rank, all ranks raise: those that failed their own
    error, the others a RankError."""
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
    raise RankError(rank, f"a stopping criterion failed: {reason}")


def _plain(out: Any) -> Any:
    """Return a result with plain tensors on every rank."""
    if isinstance(out, dict):  # a ModelOutput
        for name, value in list(out.items()):
            out[name] = materialized(value)
        return out
    return materialized(out)
