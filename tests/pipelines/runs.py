"""The work of a rank in the survey of pipelines: whole calls, plain and then sharded, in one process group."""

from __future__ import annotations

import json
import math
import random
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import shardit
from shardit import DiffusionParallelConfig
from shardit.errors import InputError, UnsupportedError
from tests.pipelines.entry import PipelineEntry, entries

AXES: dict[str, dict[str, int]] = {
    "pp 2": {"pipeline_parallel_size": 2},
    "cfg 2": {"cfg_parallel_size": 2},
    "tp 2": {"tensor_parallel_size": 2},
    "ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
}
"""The ways of sharding that every pipeline is tried with: arguments of DiffusionParallelConfig."""

PRODUCTS: dict[str, dict[str, int]] = {
    "tp 2 x pp 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "tp 2 x cfg 2": {"tensor_parallel_size": 2, "cfg_parallel_size": 2},
    "pp 2 x cfg 2": {"pipeline_parallel_size": 2, "cfg_parallel_size": 2},
}
"""More of them, which are not in the table."""

BITWISE = ("pp", "cfg")
"""Axes that must give the same bits."""

CLOSE = 2e-5
"""Largest relative L2 distance on the others. Most are below 1e-5; AceStep has 1.1e-5, where batches are split, too."""

ROUNDED = 2**-8
"""The same for pipelines that round to fewer bits: values may have been rounded the other way, to the next number in
bfloat16."""

KINDS = ("right", "plain", "refused", "wrong", "failed")
"""Outcomes, the worst last. "plain": the library alone fails here."""

WAIT_S = 40.0


@dataclass
class Outcome:
    """The outcome of one pipeline on one axis: one of `KINDS`, the distance, the message, and the rank's share of all
    parameters."""

    name: str
    axis: str
    kind: str
    distance: float = 0.0
    message: str = ""
    held: float = 1.0


class NotSame(AssertionError):
    """The structure of two results differs."""


def survey(rank: int, count: int, method: str, tasks: Sequence[tuple[str, str]], folder: str) -> None:
    """Run (class name, axis) one after the other; a line of JSON for each. Ends at the first failure."""
    dist.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=count, timeout=timedelta(seconds=WAIT_S + 20)
    )
    plain: dict[str, Any] = {}
    with Path(folder, f"{rank}.jsonl").open("w", encoding="utf-8") as out:
        for name, axis in tasks:
            outcome = _attempt(entries()[name], axis, plain)
            out.write(json.dumps(asdict(outcome)) + "\n")
            out.flush()
            if outcome.kind == "failed":
                return
            kinds: list[Any] = [None] * count
            dist.all_gather_object(kinds, outcome.kind)
            if "refused" in kinds and len(set(kinds)) > 1:
                raise AssertionError(f"{name}, {axis}: only some ranks refused: {kinds}")


def ranks_of(axis: str) -> int:
    """Return the number of ranks of a way of sharding."""
    return math.prod({**AXES, **PRODUCTS}[axis].values())


def plain_result(entry: PipelineEntry) -> tuple[list[np.ndarray], int]:
    """Return the library's own result of a call, and the number of parameters. Raises the error of the call."""
    pipe = built(entry)
    size = sum(parameters(pipe))
    leaves = run(pipe, entry)
    if not leaves:
        raise ValueError("the output has nothing to compare")
    for leaf in leaves:
        if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
            raise ValueError("not all values of the output are finite")
    if all(leaf.size < 2 or leaf.dtype.kind == "U" or np.ptp(leaf) == 0 for leaf in leaves):
        raise ValueError("all values of the output are the same")
    return leaves, size


def _attempt(entry: PipelineEntry, axis: str, plain: dict[str, Any]) -> Outcome:
    if entry.name not in plain:
        plain.clear()
        try:
            plain[entry.name] = plain_result(entry)
        except Exception:
            plain[entry.name] = traceback.format_exc()
    if isinstance(plain[entry.name], str):
        return Outcome(entry.name, axis, "plain", message=plain[entry.name])
    expected, size = plain[entry.name]
    outcome = Outcome(entry.name, axis, "right")
    try:
        pipe = built(entry)
        shardit.parallelize(
            pipe, DiffusionParallelConfig(**{**AXES, **PRODUCTS}[axis], split_batch=False), timeout_s=WAIT_S
        )
        outcome.held = sum(parameters(pipe)) / max(size, 1)
        outcome.distance = distance(expected, run(pipe, entry))
        bound = 0 if axis.startswith(BITWISE) else ROUNDED if entry.rounded else CLOSE
        if not outcome.distance <= bound:
            outcome.kind, outcome.message = "wrong", f"relative L2 distance {outcome.distance:.2e}"
    except NotSame as error:
        outcome.kind, outcome.message = "wrong", str(error)
    except (UnsupportedError, InputError) as error:
        outcome.kind, outcome.message = "refused", str(error)
    except BaseException:
        outcome.kind, outcome.message = "failed", traceback.format_exc()
    return outcome


def parameters(pipe: Any) -> Iterable[int]:
    """Sizes of the parameters that are really here; `parameters()` lists those of other ranks, too."""
    modules = {id(m): m for m in pipe.components.values() if isinstance(m, torch.nn.Module)}
    named = (own for m in modules.values() for own in m._named_members(lambda part: part._parameters.items()))
    return [p.numel() for _, p in named if not p.is_meta]


def built(entry: PipelineEntry) -> Any:
    """The pipeline, the same each time: some draw weights that they do not find (AnimateDiff's for SDXL)."""
    torch.manual_seed(0)
    return entry.build()


def run(pipe: Any, entry: PipelineEntry) -> list[np.ndarray]:
    """One seeded call; the arrays of its output."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    more = {"generator": torch.Generator("cpu").manual_seed(1)} if entry.generator else {}
    return arrays_of(pipe(**entry.call(), **more))


def arrays_of(value: Any) -> list[np.ndarray]:
    """All numbers, pictures and texts in an output, in order."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return [(value.float() if value.is_floating_point() else value).numpy().copy()]
    if isinstance(value, (np.ndarray, str, int, float, np.generic)):
        return [np.asarray(value)]
    if isinstance(value, Mapping):
        return [array for item in value.values() for array in arrays_of(item)]
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in arrays_of(item)]
    if hasattr(value, "convert"):  # a PIL picture
        return [np.asarray(value)]
    if hasattr(value, "__dict__"):
        return [array for item in vars(value).values() for array in arrays_of(item)]
    return []


def distance(expected: list[np.ndarray], got: list[np.ndarray]) -> float:
    """The largest relative L2 distance of the arrays; 0 where all bits are the same."""
    shapes = [[(a.shape, a.dtype) for a in arrays] for arrays in (expected, got)]
    if shapes[0] != shapes[1]:
        raise NotSame(f"plain gives {shapes[0]}, sharded {shapes[1]}")
    return max(_distance(a, b) for a, b in zip(expected, got, strict=True))


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    if np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    if a.dtype.kind == "U":
        raise NotSame(f"plain gives {a!r}, sharded {b!r}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))
