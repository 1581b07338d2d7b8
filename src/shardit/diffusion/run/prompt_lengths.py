"""Reports prompts that a pipeline truncates to the length of its text encoder, which most pipelines do silently."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from shardit.core.modules.patching import subclass_in_place


def is_tokenizer(value: Any) -> bool:
    """Return whether a component of a pipeline is a tokenizer of transformers."""
    return hasattr(value, "model_max_length") and hasattr(value, "convert_ids_to_tokens") and callable(value)


def reporting_truncation(tokenizer: Any, report: Callable[[str], None]) -> Any:
    """Return a copy of a tokenizer that reports truncated texts, one line for each."""
    own, own_call = copy.copy(tokenizer), type(tokenizer).__call__

    @functools.wraps(own_call)
    def __call__(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("truncation") in (True, "longest_first") and (isinstance(text, str) or _are_texts(text)):
            limit = kwargs.get("max_length") or self.model_max_length
            special = {"add_special_tokens": kwargs.get("add_special_tokens", True), "verbose": False}
            for one in [text] if isinstance(text, str) else text:
                tokens = len(own_call(self, one, **special)["input_ids"])
                if tokens > limit:
                    report(f"a prompt of {tokens} tokens was cut to the first {limit}: {one[:40]!r} ...")
        return own_call(self, text, *args, **kwargs)

    subclass_in_place(own, {"__call__": __call__})
    return own


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
