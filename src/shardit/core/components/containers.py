"""Lists and dicts among the arguments of an owned component's call, which the call may change (a cache of features)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Entries = dict[Any, Any]
"""The entries of a list, by number, or of a dict."""

Changes = dict[int, tuple[Entries, list[Any]]]
"""By number of the container: new entries, and the keys of those that are gone."""


class Containers:
    """The lists and dicts in nested arguments."""

    def __init__(self, value: Any):
        self._found = list(_containers(value))

    def snapshot(self) -> list[Entries]:
        """Return the present entries, for `changes`."""
        return [_entries(found) for found in self._found]

    def changes(self, before: list[Entries]) -> Changes:
        """Return what was put into the containers, and taken out, since the snapshot `before`."""
        changes: Changes = {}
        for number, (was, now) in enumerate(zip(before, self.snapshot(), strict=True)):
            new = {key: value for key, value in now.items() if key not in was or was[key] is not value}
            gone = [key for key in was if key not in now]
            if new or gone:
                changes[number] = new, gone
        return changes

    def apply(self, changes: Changes) -> None:
        """Change the containers in the same way. The rank that made the changes does so, too: its entries are then
        pending, as those of others, and all ranks take part in their first use."""
        for number, (new, gone) in changes.items():
            found = self._found[number]
            for key in [key for key in reversed(gone) if key in _entries(found)]:  # of a list: the last one first
                del found[key]
            for key, value in new.items():
                if isinstance(found, list) and key == len(found):
                    found.append(value)
                else:
                    found[key] = value


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, dict)):
        yield value
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _entries(container: Any) -> Entries:
    return dict(container if isinstance(container, dict) else enumerate(container))
