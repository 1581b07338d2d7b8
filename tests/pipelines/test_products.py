"""Products of axes: whole pipelines on two and more axes at once, against plain diffusers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shardit.models import tiny
from tests.pipelines.test_pipelines import guidance, reference
from tests.support.ranks import run_ranks
from tests.support.whole_pipelines import Case, difference, joined, plain, staged

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
    {"pp": 2, "ulysses": 4},
    {"tp": 4, "pp": 2},
    {"ring": 4, "tp": 2},
]
CLOSE = 1e-5


def product(name: str, sizes: dict[str, int]) -> Case:
    """One request for each copy, or two over stages at once, with guidance; a video so small that decoding it does not
    take most of the time."""
    axes = {AXES[axis]: size for axis, size in sizes.items() if axis != "pp"}
    small = {"height": 64, "width": 64} if name == "wan2.2-ti2v" else {}
    call = {**guidance(name), "num_inference_steps": 2, **small}
    stages, copies = sizes.get("pp", 1), sizes.get("dp", 1)
    requests, in_flight = max(copies, min(stages, 2)), 1 + (stages > copies)
    return Case(name, stages, in_flight=in_flight, requests=requests, split_batch=True, call=call, axes=axes)


Results = list[dict[str, Any]]
"""Of one case, from each rank."""


def run(*cases: Case) -> list[Results]:
    """Cases of one number of ranks, in one group."""
    for case in cases:
        tiny.resolve(f"tiny/{case.name}")
    of_ranks = run_ranks(cases[0].config().world_size, staged, list(cases), timeout=400)
    return [[result[number] for result in of_ranks] for number in range(len(cases))]


def check(case: Case, results: Results) -> None:
    """Check that the ranks have the result of plain diffusers, each with its own blocks alone."""
    assert joined(results, "errors") == [None] * case.requests
    assert all(not result["strangers"] for result in results)
    if max(case.axes.get("ring_degree", 1), case.axes.get("ulysses_degree", 1)) > 1:
        assert all(result["exchanged"] > 0 for result in results)
    wanted = reference(case) if case.prompts == Case.prompts else plain(case)
    for expected, got in zip(wanted, joined(results, "arrays"), strict=True):
        assert math.isfinite(float(abs(got).sum()))
        assert difference(expected, got) <= CLOSE, case


def compare(*cases: Case) -> None:
    """Run and check cases of one number of ranks."""
    for case, results in zip(cases, run(*cases), strict=True):
        check(case, results)


@pytest.fixture(scope="module")
def pairs() -> dict[tuple[str, str], tuple[Case, Results]]:
    """Return the results of one group of ranks on every pair of axes."""
    cases = [product("wan2.2-ti2v", dict.fromkeys(pair, 2)) for pair in PAIRS]
    return dict(zip(PAIRS, zip(cases, run(*cases), strict=True), strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_axes(pair: tuple[str, str], pairs: dict[tuple[str, str], tuple[Case, Results]]) -> None:
    check(*pairs[pair])


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


@pytest.mark.full
@pytest.mark.timeout(600)
def test_guidance_over_four_stages() -> None:
    compare(product("wan2.2-ti2v", {"pp": 4, "cfg": 2}))


UP_TO_4 = [1, 2, 3, 4]
SIZES = {"dp": [1, 2], "cfg": [1, 2], "pp": UP_TO_4, "ring": UP_TO_4, "ulysses": UP_TO_4, "tp": [1, 2, 3]}
"""No more slices than heads, and no more guidance ranks than branches: all else fits every model."""


@pytest.mark.full
@pytest.mark.timeout(1800)
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],  # without shrinking: each example takes long, and is small anyway
    suppress_health_check=list(HealthCheck),
)
@given(
    name=st.sampled_from(tiny.names()),
    sizes=st.fixed_dictionaries({axis: st.sampled_from(values) for axis, values in SIZES.items()}).filter(
        lambda sizes: 1 < math.prod(sizes.values()) <= 8
    ),
)
def test_any_product(name: str, sizes: dict[str, int]) -> None:
    compare(product(name, sizes))


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["wan2.2-ti2v", *OTHERS])
def test_empty_and_long_prompts(name: str) -> None:
    """On every axis. Prompts too long for the model are truncated, as by plain diffusers."""
    axes = [axis for axis in AXES if axis != "dp"]
    cases = [dataclasses.replace(product(name, {axis: 2}), prompts=("", "a cat " * 300), requests=2) for axis in axes]
    compare(*cases)
