"""Information about a language model for the user's process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardit.language.limits import POSITION_LIMITS


@dataclass(frozen=True)
class LanguageInfo:
    """max_model_len: maximum tokens of a prompt and its text together, None without a limit. vocabulary: number of
    tokens in the vocabulary. defaults: sampling parameters of the folder's generation configuration. bytes_read,
    held_bytes, limit_bytes: as in `ModelInfo`."""

    max_model_len: int | None
    vocabulary: int
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bytes_read: int = 0
    held_bytes: int = 0
    limit_bytes: int | None = None


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: those of the generation configuration and that of the tokenizer."""
    own = generation_config.eos_token_id
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    return frozenset(one for one in (*found, tokenizer.eos_token_id) if one is not None)


def max_positions(config: Any) -> int | None:
    """Return the maximum number of positions of a model; None if it has no limit."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in POSITION_LIMITS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)  # -1 of XLNet is none
