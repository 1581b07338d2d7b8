"""Survey of gradients over two stages (1F1B) or two tensor ranks: every class of diffusers that the survey of calls
has.

`python -m tests.training.survey [--tensor] [NAME ...]` prints a line for each class, and the totals. NAME: a class of
diffusers, or a family of causal language models.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter

from shardit import RankError, UnsupportedError
from tests.support.ranks import RanksFailed, run_ranks
from tests.training.models import survey_ids, task
from tests.training.runs import join, one_step

STAGES, TENSOR = "pipeline_parallel_size", "tensor_parallel_size"

AT_ONCE = 8
"""Classes that a group of ranks runs before it is restarted."""

CLOSE = 2e-6
"""Largest relative difference of the loss, and of a gradient: on tensor ranks beyond the effect of rounding."""


def measure(rank: int, size: int, method: str, names: list[str], axis: str) -> list[tuple[str, str]]:
    """Return the outcome of each class on this rank, up to one that ends the ranks."""
    join(rank, size, method)
    logging.disable(logging.WARNING)
    found = []
    for name in names:
        try:
            got = one_step(task(name), 3, {axis: size})
            right = not got["only"] and got["beyond"] < CLOSE and got["loss"] < CLOSE and got["compared"] > 0
            more = f" ({got['beyond']:.1e} beyond rounding)" if got["beyond"] != got["worst"] else ""
            text = f"{got['worst']:.1e}{more} over {got['compared']} of {got['of']} parameters, loss {got['loss']:.0e}"
            found.append((name, f"right: {text}" if right else f"WRONG: {text} {got['only'][:2]}"))
        except RankError as error:
            found.append((name, f"ended: {error}"))
            break
        except UnsupportedError as error:
            found.append((name, f"refused: {error}"))
        except Exception as error:
            found.append((name, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
    return found


def outcomes(names: list[str], axis: str = STAGES) -> dict[str, str]:
    """Measure the classes (all, if none is named), print a line for each, and return what became of each."""
    todo, found = list(names or survey_ids()), dict[str, str]()
    while todo:
        try:
            of_ranks = run_ranks(2, measure, todo[:AT_ONCE], axis, timeout=200)
        except RanksFailed as error:
            of_ranks = [[(todo[0], f"ended: {str(error).splitlines()[-1]}")]] * 2
        for one, other in zip(*of_ranks, strict=False):
            name, outcome = next((o for o in (one, other) if not o[1].startswith("right")), one)
            found[name] = outcome
            print(f"{name}: {outcome[:230]}", flush=True)
            todo.remove(name)
    return found


if __name__ == "__main__":
    given = [one for one in sys.argv[1:] if one != "--tensor"]
    measured = outcomes(given, STAGES if given == sys.argv[1:] else TENSOR)
    print(dict(Counter(text.partition(":")[0] for text in measured.values())))
