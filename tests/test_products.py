"""Products of axes: whole pipelines on two and more axes at once, against plain diffusers."""

from __future__ import annotations

import itertools
import math

import pytest

from shardit.models import tiny
from tests.ranks import run_ranks
from tests.test_pipelines import guidance, reference
from tests.whole_pipelines import Case, difference, joined, staged

AXES = {
    "dp": "data_parallel_size",
    "cfg": "cfg_parallel_size",
    "pp": "pipeline_parallel_size",
    "ring": "ring_degree",
    "ulysses": "ulysses_degree",
    "tp": "tensor_parallel_size",
}
PAIRS = list(itertools.combinations(AXES, 2))
"""Every pair of axes, two ranks each."""
OTHERS = ("qwen-image", "z-image", "flux", "sd3.5", "longcat-image")
TRIPLES = [
    {"cfg": 2, "pp": 2, "tp": 2},
    {"pp": 2, "ring": 2, "ulysses": 2},
    {"cfg": 2, "ulysses": 2, "tp": 2},
    {"dp": 2, "cfg": 2, "pp": 2},
    {"pp": 4, "cfg": 2},
    {"pp": 2, "ulysses": 4},
    {"tp": 4, "pp": 2},
    {"ring": 4, "tp": 2},
]
CLOSE = 1e-5


def product(name: str, sizes: dict[str, int]) -> Case:
    """One request for each copy, with guidance."""
    axes = {AXES[axis]: size for axis, size in sizes.items() if axis != "pp"}
    call = {**guidance(name), "num_inference_steps": 2}
    return Case(name, sizes.get("pp", 1), requests=sizes.get("dp", 1), split_batch=True, call=call, axes=axes)


def compare(case: Case) -> None:
    tiny.resolve(f"tiny/{case.name}")
    of_ranks = run_ranks(case.config().world_size, staged, [case], timeout=400)
    results = [result[0] for result in of_ranks]
    assert joined(results, "errors") == [None] * case.requests
    assert all(not result["strangers"] for result in results)
    for expected, got in zip(reference(case), joined(results, "arrays"), strict=True):
        assert math.isfinite(float(abs(got).sum()))
        assert difference(expected, got) <= CLOSE


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_axes(pair: tuple[str, str]) -> None:
    compare(product("wan2.2-ti2v", dict.fromkeys(pair, 2)))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_axes_in_other_models(name: str, pair: tuple[str, str]) -> None:
    compare(product(name, dict.fromkeys(pair, 2)))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sizes", TRIPLES, ids=str)
def test_eight_ranks(sizes: dict[str, int]) -> None:
    compare(product("wan2.2-t2v", sizes))
