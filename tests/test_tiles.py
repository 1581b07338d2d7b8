"""VAEs whose tiles are dealt to ranks, against diffusers' own tiling on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardit.config import DiffusionParallelConfig
from shardit.core.comm import Comm
from shardit.core.mesh import init_mesh
from shardit.core.pending import settle
from shardit.parallel.tiles import spread_tiles
from tests.ranks import run_ranks
from tests.vae_models import ENTRIES, Entry, outputs


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
        plans = [r[number]["plans"] for i, r in enumerate(results) if i in ranks]
        assert plans[0]
        for owners in plans[0].values():
            assert set(owners) == set(range(len(ranks))), (name, owners)


def test_two_ranks() -> None:
    compare(list(ENTRIES), 2, (0, 1))
