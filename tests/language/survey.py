"""Survey of every causal language model of transformers that can be built tiny, over two stages.

`python -m tests.language.survey [--tensor] [FAMILY ...]` prints a line for each family, and the totals. Each runs the
kinds of `generate` in `cases.py`, and prompts in batches as `LLM` does. --tensor: two tensor ranks instead, with equal
tokens and close logits; the line lists the modules that stay whole.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
import transformers

from shardit import DiffusionParallelConfig, RankError, UnsupportedError
from shardit.core.comm.mesh import init_mesh
from shardit.core.stages.runtime import Runtime
from shardit.language.sharding import lay_out_decoder, shard_decoder
from tests.language import families
from tests.language.batched import compare_batches
from tests.language.cases import CASES, compare
from tests.support.ranks import RanksFailed, run_ranks

AT_ONCE = 10
"""Families that a group of ranks runs before it is restarted."""


CLOSE = 1e-3
"""Maximum relative distance of logits on slices. Wrong heads give 0.1 and more; other last bits of the weights change
some logits of these tiny models by as much as this (linear attention with experts)."""


def measure(rank: int, count: int, method: str, names: list[str], axis: str) -> list[tuple[str, list[str], str]]:
    """Return the results of families on this rank, up to one that ends the ranks, and the modules that stay whole."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    config = DiffusionParallelConfig(**{axis: count})
    close = CLOSE if axis == "tensor_parallel_size" else 0.0
    mesh = init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method)
    runtime, found = Runtime.of(mesh, split_batch=False), []
    for name in names:
        results: list[str] = []
        found.append((name, results, ""))
        try:
            plain, model = families.make(name), families.make(name)
            layout = lay_out_decoder(model, config)
            shard_decoder(model, runtime, layout, config)
            for case in CASES:
                try:
                    results.append(compare(plain, model, case, close))
                except RankError:
                    raise
                except Exception as error:
                    results.append(f"{type(error).__name__}: {error}")
            results.append(compare_batches(plain, model, runtime))
            if close:
                became_whole = [*model.shardit_checks.whole.values()][:1]
                found[-1] = (name, results, "; ".join([*layout.notes, *became_whole]))
        except Exception as error:
            kind = type(error).__name__ if isinstance(error, UnsupportedError) else "ended"
            results.append(f"{kind}: {error}")
            if isinstance(error, RankError):
                break
    return found


def buildable() -> list[str]:
    """Return the families that can be built small and generate on one rank."""
    found = []
    for name in families.classes():
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(families.config_of(name))
            if families.parameters(model) < 80_000_000:
                CASES[0](families.make(name))
                found.append(name)
        except Exception as error:
            print(f"{name}: not built ({type(error).__name__}: {str(error).splitlines()[0][:100]})", flush=True)
    return found


def survey(names: list[str], axis: str) -> Iterator[tuple[str, list[str], str]]:
    """Measure families over two ranks. Yield for each its name, the results of the cases and of batches, and the
    modules that stay whole."""
    todo = list(names)
    while todo:
        try:
            of_ranks = run_ranks(2, measure, todo[:AT_ONCE], axis, timeout=600)
        except RanksFailed as error:
            of_ranks = [[(todo[0], [f"ended: {str(error).splitlines()[-1]}"], "")]] * 2
        for one, other in zip(*of_ranks, strict=False):
            yield one[0], one[1] if one[1] == other[1] else ["WRONG: ranks differ"], one[2]
            todo.remove(one[0])


def outcome_of(results: list[str]) -> tuple[str, list[str]]:
    """Return "right", "refused", "failed", "ended" or "WRONG", and the results that show it."""
    refused = [result for result in results if result.startswith(("UnsupportedError", "InputError"))]
    failed = [result for result in results if result not in ("right", "not on one rank", *refused)]
    kinds = {result.partition(":")[0] for result in failed}
    worst = next((kind for kind in ("WRONG", "ended") if kind in kinds), "failed" if failed else "right")
    return ("refused", refused) if worst == "right" and refused else (worst, failed)


def main(names: list[str]) -> None:
    """Measure families and print a line for each."""
    axis = "tensor_parallel_size" if "--tensor" in names else "pipeline_parallel_size"
    names, sums = [name for name in names if name != "--tensor"], Counter[str]()
    for name, results, whole in survey(names or buildable(), axis):
        outcome, shown = outcome_of(results)
        sums[outcome] += 1
        print(f"{name}: {outcome} {shown[0][:200] if shown else whole}", flush=True)
    print(dict(sums))


if __name__ == "__main__":
    main(sys.argv[1:])
