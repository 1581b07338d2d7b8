"""What the user's process knows of a language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shardit.language.limits import ROOM


@dataclass(frozen=True)
class LanguageInfo:
    """room: the most tokens of a prompt and its text together, None without a limit. vocabulary: the number of tokens
    that the model knows. defaults: what the folder says of sampling. bytes_read, held_bytes, limit_bytes: as of a
    pipeline."""

    room: int | None
    vocabulary: int
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bytes_read: int = 0
    held_bytes: int = 0
    limit_bytes: int | None = None


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: of the generation configuration, and that of the tokenizer."""
    own = generation_config.eos_token_id
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    return frozenset(one for one in (*found, tokenizer.eos_token_id) if one is not None)


def room_of(config: Any) -> int | None:
    """The most tokens that the positions of a model allow."""
    text = config.get_text_config(decoder=True)
    return next((value for name in ROOM if isinstance(value := getattr(text, name, None), int)), None)
