"""A pipeline object of one request's own, over shared modules: pipelines keep the state of a call on themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shardit.diffusion.run.prompt_lengths import is_tokenizer, telling_cuts


def own_pipeline(pipe: Any, finish: Callable[[Any], None], tell: Callable[[str], None]) -> Any:
    """A copy of a pipeline, and of the pipelines that it is made of, with schedulers and tokenizers of their own.

    finish: called with each copy. tell: called with a line for each prompt that is cut.
    """
    made: dict[int, Any] = {}

    def own_of(value: Any) -> Any:
        if isinstance(value, SchedulerMixin):
            return copy.deepcopy(value)
        if isinstance(value, DiffusionPipeline):
            return copied(value)
        return telling_cuts(value, tell) if is_tokenizer(value) else value

    def copied(pipe: Any) -> Any:
        own = copy.copy(pipe)
        for name, value in list(vars(own).items()):
            if id(value) not in made:
                made[id(value)] = own_of(value)
            vars(own)[name] = made[id(value)]
        finish(own)
        return own

    return copied(pipe)
