"""Whole pipelines over stages against plain diffusers on one rank, bit by bit."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from shardit.models import tiny
from tests.support.ranks import run_ranks
from tests.support.whole_pipelines import Case, difference, joined, plain, staged

BATCHED = ("sd3.5", "z-image")  # these pipelines put both branches of guidance into one call
LOOPED, CONTIGUOUS = 2, 1


@functools.lru_cache(maxsize=64)
def expected(name: str, dtype: str | None, requests: int, with_image: bool, scheduler: str | None, call: tuple) -> list:
    return plain(Case(name, 2, None, dtype, 1, requests, False, with_image, None, dict(call), scheduler))


def reference(case: Case) -> list[np.ndarray]:
    return expected(
        case.name, case.dtype, case.requests, case.with_image, case.scheduler, tuple(sorted(case.call.items()))
    )


def compare(cases: list[Case]) -> list[list[dict]]:
    """Run cases of one rank count in one group; every one must be bit-equal, with no rank running another's blocks."""
    for case in cases:
        tiny.resolve(f"tiny/{case.name}")
    results = run_ranks(cases[0].config().world_size, staged, cases)
    for number, case in enumerate(cases):
        of_ranks = [result[number] for result in results]
        assert joined(of_ranks, "errors") == [None] * case.requests, case
        for plain_array, array in zip(reference(case), joined(of_ranks, "arrays"), strict=True):
            assert np.isfinite(plain_array).all()
            assert np.array_equal(plain_array, array), (case, difference(plain_array, array))
        assert all(not r["strangers"] for r in of_ranks), case
        for name in of_ranks[0]["ran"]:
            assert sum(r["ran"][name] > 0 for r in of_ranks) in (0, len(of_ranks)), case
    return [[result[number] for result in results] for number in range(len(cases))]


def test_every_model_two_stages_automatic() -> None:
    compare([Case(name) for name in tiny.names()])


FEW = ("wan2.2-t2v", "qwen-image", "z-image", "flux")
MORE = pytest.param(tuple(name for name in tiny.names() if name not in FEW), marks=pytest.mark.full, id="more")


@pytest.mark.parametrize("names", [pytest.param(FEW, id="few"), MORE])
def test_guided_branches_in_flight_at_once(names: tuple[str, ...]) -> None:
    """Counted by the schedule: both branches of a step were in flight, in every model that has guidance."""
    cases = [Case(name, split_batch=name in BATCHED, call=guidance(name)) for name in names]
    results = run_ranks(2, staged, cases)
    for number, case in enumerate(cases):
        of_ranks = [result[number] for result in results]
        assert joined(of_ranks, "errors") == [None], case
        assert [r["in_flight"] for r in of_ranks] == [2, 2], case
        error = difference(reference(case)[0], joined(of_ranks, "arrays")[0])
        assert error <= (1e-5 if case.split_batch else 0), (case, error)


def guidance(name: str) -> dict:
    """Arguments that enable true guidance for models without it by default."""
    return {"negative_prompt": "blurry", "true_cfg_scale": 3.0} if name == "flux" else {}


@pytest.mark.parametrize("pp", [3, pytest.param(4, marks=pytest.mark.full)])
def test_more_stages(pp: int) -> None:
    names = ("wan2.2-t2v", "qwen-image-edit", "z-image", "flux")
    compare([Case(name, pp, LOOPED if i % 2 else CONTIGUOUS) for i, name in enumerate(names)])


@pytest.mark.full
@pytest.mark.parametrize("names", [pytest.param(FEW[:2], id="few"), MORE])
def test_bfloat16(names: tuple[str, ...]) -> None:
    compare([Case(name, 2, LOOPED, "bfloat16") for name in names])


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("wan2.2-t2v", "z-image"), id="few"),
        pytest.param(("qwen-image-edit-2509", "ovis-image"), marks=pytest.mark.full, id="more"),
    ],
)
def test_several_requests_in_flight(names: tuple[str, ...]) -> None:
    cases = [Case(name, in_flight=n, requests=4) for name, n in zip(names, (2, 4), strict=True)]
    results = compare(cases)
    for case, of_ranks in zip(cases, results, strict=True):
        assert of_ranks[0]["in_flight"] >= case.in_flight


def test_text_or_image_over_the_same_components() -> None:
    compare([Case("wan2.2-ti2v"), Case("wan2.2-ti2v", with_image=True)])


def test_without_guidance() -> None:
    off = {"guidance_scale": 1.0}
    compare([Case("wan2.2-t2v", call=off), Case("sd3.5", call=off), Case("qwen-image", call={"true_cfg_scale": 1.0})])


def test_stochastic_scheduler() -> None:
    """A scheduler that draws noise at each step, several requests in flight: each has generators of its own."""
    scheduler = "FlowMatchEulerDiscreteScheduler"
    compare([Case(name, in_flight=3, requests=3, scheduler=scheduler) for name in ("flux", "sd3.5")])


def test_several_outputs_per_prompt() -> None:
    compare([Case("qwen-image", call={"num_outputs_per_prompt": 2}), Case("flux", call={"num_outputs_per_prompt": 3})])


def test_split_batch_is_close() -> None:
    cases = [Case(name, split_batch=True, call={"num_outputs_per_prompt": 2}) for name in ("sd3.5", "z-image", "flux")]
    results = run_ranks(2, staged, cases)
    for number, case in enumerate(cases):
        of_ranks = [result[number] for result in results]
        assert joined(of_ranks, "errors") == [None]
        assert all(split for r in of_ranks for splits in r["splits"] for split in splits.values()), case
        assert difference(reference(case)[0], joined(of_ranks, "arrays")[0]) <= 1e-5, case


def test_uneven_partition() -> None:
    compare([Case("wan2.2-ti2v", 2, partition=(5, 3)), Case("wan2.2-t2v", 2, CONTIGUOUS, partition=(3, 5))])


def test_eight_stages() -> None:
    compare([Case("wan2.2-ti2v", 8)])


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [CONTIGUOUS, LOOPED])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_matrix(pp: int, chunks: int, dtype: str) -> None:
    cases = [Case(name, pp, chunks, dtype) for name in tiny.names()]
    compare([*cases, Case("wan2.2-ti2v", pp, chunks, dtype, with_image=True)])


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("in_flight", [1, 2, 4])
@pytest.mark.parametrize("guided", [True, False])
def test_requests_matrix(in_flight: int, guided: bool) -> None:
    cases = [Case(name, in_flight=in_flight, requests=in_flight) for name in tiny.names()]
    if not guided:
        cases = [dataclasses.replace(case, call=unguided(case.name)) for case in cases]
    compare(cases)


def unguided(name: str) -> dict:
    keys = tiny.defaults(name)
    return {key: 1.0 for key in ("guidance_scale", "true_cfg_scale", "guidance_scale_2") if key in keys}
