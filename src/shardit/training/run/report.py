"""Reports of the first rank: a progress bar, notes, rows of metrics.jsonl, events for TensorBoard."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from shardit.settings.environment import PROGRESS, switch
from shardit.training.run.run_folder import EVENTS, METRICS

LINES = 20
"""Lines of progress in a run whose standard error is no terminal, about."""


class Report:
    """The output of one rank; does nothing unless it `leads`. steps: of the whole run; done: those before."""

    def __init__(self, output: Path, leads: bool, steps: int, done: int, tensorboard: bool):
        self._leads, self._file, self._bar, self._events = leads, output / METRICS, None, None
        self._failed, self._steps = False, steps
        if not leads:
            return
        cut(self._file, done)
        if tensorboard:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._events = writer(str(output / EVENTS), purge_step=done + 1)
        if switch(PROGRESS, os.environ, default=True):
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", desc="train", disable=None)

    def note(self, text: str) -> None:
        """Print a note."""
        self.print_line(f"note: {text}")

    def print_line(self, text: str) -> None:
        """Print a line on standard output, above the bar."""
        if not self._leads:
            return
        if self._bar is not None and not self._bar.disable:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text)
        sys.stdout.flush()

    def row(self, row: dict[str, Any]) -> None:
        """Write the row of a step."""
        if not self._leads:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            if not self._failed:
                self.note(f"{self._file} cannot be written ({error.strerror}): rows are missing")
            self._failed = True
        if self._events is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._events.add_scalar(f"train/{name}", value, row["step"])
        if self._bar is not None:
            self._show(self._bar, row)

    def _show(self, bar: Any, row: dict[str, Any]) -> None:
        """Move the bar on a terminal; elsewhere print a line now and then."""
        step = row["step"]
        if not bar.disable:
            bar.set_postfix_str(_short(row), refresh=False)
            bar.update()
        elif step in (1, self._steps) or step % max(1, self._steps // LINES) == 0:
            print(f"step {step} of {self._steps}: {_short(row)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar and the events."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            self._events.close()


def _short(row: dict[str, Any]) -> str:
    loss = row["loss"]
    return f"loss {math.nan if loss is None else loss:.4g}, lr {row['lr']:.3g}"


def cut(file: Path, done: int) -> None:
    """Remove the rows of a file after step `done`, and a row that was not written to its end."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text("utf-8", errors="replace").split("\n"):  # a name may have other separators of lines
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= done:
            kept.append(f"{line}\n")
    other = file.with_name(f".{file.name}.partial")
    other.write_text("".join(kept), "utf-8")
    os.replace(other, file)
