"""Progress bars of requests on a terminal."""

from __future__ import annotations

import os
from typing import Any


class Bars:
    """A progress bar for each request."""

    def __init__(self) -> None:
        self._bars: dict[int, Any] = {}
        self._off = os.environ.get("SHARDIT_PROGRESS") == "0"

    def update(self, index: int, step: int, total: int) -> None:
        """Show that request `index` has finished `step` of `total` steps."""
        if self._off:
            return
        if index not in self._bars:
            from tqdm import tqdm

            # Seconds per step even where tqdm would turn to steps per second.
            form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
            self._bars[index] = tqdm(total=total, desc=f"request {index}", unit="step", bar_format=form)
        bar = self._bars[index]
        bar.update(step - bar.n)
        if step >= total:
            bar.close()

    def close(self) -> None:
        """Leave the bars as they are and end their lines."""
        for bar in self._bars.values():
            bar.close()
