"""Reports the progress of a request by replacing the progress bar of its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shardit.core.modules.patching import subclass_in_place


class Steps:
    """Replaces the progress bar of a pipeline: counts steps and passes them on."""

    def __init__(self, index: int, total: int, on_progress: Callable[[int, int, int], None], items: Iterable[Any] = ()):
        self._index, self.total, self._on_progress, self._items = index, total, on_progress, items
        self.n = 0
        on_progress(index, 0, total)

    def update(self, count: int = 1) -> None:
        """Count `count` more finished steps."""
        self.n += count
        self._on_progress(self._index, self.n, self.total)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None  # set_postfix, close and other methods of a bar


def report_progress(pipe: Any, index: int, on_progress: Callable[[int, int, int], None]) -> None:
    """Make a pipeline object of one request report its steps as (index, step, total) instead of drawing a bar."""

    def progress_bar(
        self: Any, iterable: Iterable[Any] | None = None, total: int | None = None, *_: Any, **how_it_looks: Any
    ) -> Steps:
        items = list(iterable) if iterable is not None else []
        return Steps(index, total if total is not None else len(items), on_progress, items)

    subclass_in_place(pipe, {"progress_bar": progress_bar})
