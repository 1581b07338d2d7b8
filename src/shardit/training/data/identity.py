"""The identity of data: what a run has to find again when it resumes, and what differs if it does not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from shardit.errors import listed
from shardit.training.data.items import Item, count

ITEMS = "items"
"""The key of the items in an identity; other keys are settings."""


def item_identity(item: Item, bucket: object) -> str:
    """Return what decides a sample: digests of its caption and its content, and its bucket."""
    words = hashlib.blake2b(item.caption.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{words} {item.media.digest()} {bucket}"


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in one line how two identities differ; "" if they are equal."""
    found = _items(before.get(ITEMS, {}), now.get(ITEMS, {}))
    for name in sorted((before.keys() | now.keys()) - {ITEMS}):
        if before.get(name) != now.get(name):
            found.append(f"{name} was {before.get(name)!r:.60} and is {now.get(name)!r:.60}")
    return "; ".join(found)


def _items(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    kinds: dict[str, list[str]] = {"is gone": [], "is new": [], "is another": [], "has changed its caption": []}
    kinds |= {"has changed its content": [], "has changed its bucket": []}
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            kinds["is gone"].append(name)
        elif name not in before:
            kinds["is new"].append(name)
        elif before[name] != now[name]:
            kinds[_change(before[name].split(" ", 2), now[name].split(" ", 2))].append(name)
    return [_difference_text(names, kind) for kind, names in kinds.items() if names]


def _change(before: Sequence[str], now: Sequence[str]) -> str:
    changed = [one for one, old, new in zip(("caption", "content", "bucket"), before, now, strict=False) if old != new]
    return f"has changed its {changed[0]}" if len(changed) == 1 else "is another"


def _difference_text(names: list[str], kind: str) -> str:
    if len(names) == 1:
        return f"{names[0]} {kind}"
    several = kind.replace("has ", "have ").replace("is ", "are ").replace("its", "their").replace("another", "others")
    return f"{count(len(names), 'item', 'items')} {several} ({listed(names)})"
