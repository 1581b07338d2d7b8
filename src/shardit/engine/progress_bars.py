"""Progress bars on a terminal."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from shardit.settings.environment import PROGRESS, switch


class Bars:
    """A progress bar for each request."""

    def __init__(self) -> None:
        self._bars: dict[int, Any] = {}
        self._off = _switched_off()

    def update(self, index: int, step: int, total: int, made: Any = None) -> None:
        """Show that request `index` has finished `step` of `total` steps; as an `OnProgress`."""
        if self._off:
            return
        if index not in self._bars:
            from tqdm import tqdm

            # Seconds per step even if tqdm would switch to steps per second.
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
            self._bars[index] = tqdm(total=total, desc=f"request {index}", unit="step", bar_format=form)
        bar = self._bars[index]
        bar.update(step - bar.n)
        if step >= total:
            bar.close()

    def close(self) -> None:
        """Leave the bars visible and end their lines."""
        for bar in self._bars.values():
            bar.close()


class TokenBar:
    """A progress bar on a terminal for the texts of a call of `LLM`. count: number of texts. shown: whether to draw
    it."""

    def __init__(self, count: int, shown: bool = True):
        self._count, self._tokens, self._bar = count, 0, None
        self._off = not shown or count == 0 or _switched_off()
        self._ended: set[int] = set()

    def update(self, index: int, step: int, total: int, made: Any = ()) -> None:
        """Count token `step` of at most `total` of text `index`; None if it has ended with one that is not shown; as
        an `OnProgress`."""
        if self._off:
            return
        if self._bar is None:
            from tqdm import tqdm

            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(total=self._count, desc="texts", bar_format=form, disable=None)
            self._begun = time.perf_counter()
        self._tokens += sum(token is not None for token in made)
        before = len(self._ended)
        if step >= total or None in made:
            self._ended.add(index)
        rate = self._tokens / max(time.perf_counter() - self._begun, 1e-3)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(len(self._ended) - before)

    def close(self) -> None:
        """Finish the bar when all texts have ended, or the call has failed."""
        if self._bar is not None:
            self._bar.update(self._count - self._bar.n)
            self._bar.close()


def _switched_off() -> bool:
    """Return whether bars are not wanted, or have no stream: Python has None for a standard stream that is closed."""
    return not switch(PROGRESS, os.environ, default=True) or sys.stderr is None
