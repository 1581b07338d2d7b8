"""Copies a pipeline for one request, over shared modules: a pipeline object stores the state of its call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shardit.diffusion.run.prompt_lengths import is_tokenizer, reporting_truncation


def own_pipeline(pipe: Any, finish: Callable[[Any], None], report: Callable[[str], None]) -> Any:
    """Return a copy of a pipeline and of its nested pipelines, with schedulers and tokenizers of their own.

    finish: called with each copy. report: called with a line for each truncated prompt.
    """
    made: dict[int, Any] = {}

    def own_of(value: Any) -> Any:
        if isinstance(value, SchedulerMixin):
            return copy.deepcopy(value)
        if isinstance(value, DiffusionPipeline):
            return copied(value)
        return reporting_truncation(value, report) if is_tokenizer(value) else value

    def copied(pipe: Any) -> Any:
        own = copy.copy(pipe)
        for name, value in list(vars(own).items()):
            if id(value) not in made:
                made[id(value)] = own_of(value)
            vars(own)[name] = made[id(value)]
        finish(own)
        return own

    return copied(pipe)
