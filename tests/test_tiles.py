"""VAEs whose tiles are dealt to ranks, against diffusers' own tiling on one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shardit.models import tiny

from shardit.config import DiffusionParallelConfig
from shardit.core.comm import Comm
from shardit.core.mesh import init_mesh
from shardit.core.pending import settle
from shardit.parallel.tiles import spread_tiles
from tests.ranks import run_ranks
from tests.vae_models import ENTRIES, Entry, outputs
from tests.whole_pipelines import Case, difference, joined, staged
from tests.whole_pipelines import plain as plain_pipeline


def comm_of(rank: int, size: int, method: str) -> Comm:
    config = DiffusionParallelConfig(ulysses_degree=size)
    mesh = init_mesh(config, device="cpu", timeout_s=60, rank=rank, init_method=method)
    return Comm(mesh, mesh.replica)


def spread(rank: int, size: int, method: str, names: list[str], ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    comm, found = comm_of(rank, size, method), []
    for entry in (ENTRIES[name] for name in names):
        vae = entry.build()
        tiles = spread_tiles(vae, comm, ranks)
        entry.switch_on(vae)
        out = outputs(entry, vae)
        settle(out)
        plans = {key[0]: plan.owners for key, plan in tiles._plans.items()}
        found.append({"out": out, "ran": dict(tiles.ran), "plans": plans, "meta": next(vae.parameters()).is_meta})
    return found


def plain(entry: Entry) -> dict[str, torch.Tensor]:
    vae = entry.build()
    entry.switch_on(vae)
    return outputs(entry, vae)


def compare(names: list[str], size: int, ranks: tuple[int, ...]) -> None:
    results = run_ranks(size, spread, names, ranks)
    for number, name in enumerate(names):
        for method, expected in plain(ENTRIES[name]).items():
            for rank, result in enumerate(results):
                got = result[number]["out"][method]
                assert torch.isfinite(expected).all()
                assert torch.equal(expected, got), (name, method, rank, (expected - got).abs().max())
        found = [results[rank][number] for rank in ranks]
        for owners in found[0]["plans"].values():
            assert set(owners) == set(range(len(ranks))), (name, owners)
        assert [bool(r["ran"]) for r in found] == [True] * len(ranks), name


def test_two_ranks() -> None:
    compare(list(ENTRIES), 2, (0, 1))


SMALL = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 64,
    "tile_sample_stride_height": 48,
    "tile_sample_stride_width": 48,
}


def whole(name: str, pp: int = 1, with_image: bool = False, shares: int = 2, **axes: int) -> Case:
    """A tiny pipeline whose VAE is shared by two ranks."""
    axes["vae_patch_parallel_size"] = shares
    tiling = {} if name in ("flux", "sd3.5", "z-image") else SMALL
    return Case(name, pp, with_image=with_image, call={"num_inference_steps": 2}, axes=axes, tiling=tiling)


def compare_whole(case: Case, close: float = 0.0) -> None:
    tiny.resolve(f"tiny/{case.name}")
    results = [r[0] for r in run_ranks(case.config().world_size, staged, [case])]
    assert joined(results, "errors") == [None] * case.requests
    for expected, got in zip(plain_pipeline(case), joined(results, "arrays"), strict=True):
        assert np.isfinite(expected).all()
        assert difference(expected, got) <= close, case
    shared = [r for r in results if r["tiles"]]
    assert len(shared) == case.axes["vae_patch_parallel_size"], case


@pytest.mark.parametrize(
    ("case", "close"),
    [
        (whole("wan2.2-ti2v", pp=2), 0.0),
        (whole("wan2.2-ti2v", pp=2, with_image=True), 0.0),
        (whole("flux", cfg_parallel_size=2), 0.0),
        (whole("qwen-image", tensor_parallel_size=2), 1e-5),
        (whole("flux", ulysses_degree=2), 1e-5),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_whole_pipelines(case: Case, close: float) -> None:
    compare_whole(case, close)
