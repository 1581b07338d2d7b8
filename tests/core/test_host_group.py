"""Messages through host memory: every operation of a group, and every axis, as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardit import DiffusionParallelConfig, InputError
from shardit.core.comm.collectives import Collectives
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.host_group import HostGroup
from shardit.core.comm.mesh import init_mesh
from shardit.core.comm.p2p import AHEAD_BYTES, Comm
from shardit.models import tiny
from tests.support.ranks import run_ranks
from tests.support.shared_device import AXES, BITWISE, run_axis


def use_groups(rank: int, count: int, method: str) -> dict[str, Any]:
    """Use all operations of the groups of a mesh of stages."""
    config = DiffusionParallelConfig(pipeline_parallel_size=count, transport="host")
    mesh = init_mesh(config, device="cpu", timeout_s=30, rank=rank, init_method=method)
    group, world = mesh.pipeline, GroupCoordinator.of_mesh(mesh)["world"]
    assert isinstance(group.device_group, HostGroup)
    assert isinstance(world.device_group, HostGroup)
    assert all(isinstance(edge, HostGroup) for edge in group.edges.values())
    mine = torch.full((2, 3), float(rank + 1))
    found: dict[str, Any] = {
        "sum": group.all_reduce(mine.clone()),
        "world": world.all_reduce(mine.clone()),
        "gathered": group.all_gather(mine, 0),
        "first": group.broadcast(mine.clone(), 0),
        "scattered": group.reduce_scatter(torch.stack([mine] * count)),
        "complex": Collectives(group).all_gather(mine.to(torch.complex64), [2] * count, 0),
    }
    after, before = (rank + 1) % count, (rank - 1) % count
    received = torch.zeros(2, 3)
    group.wait(group.exchange([(mine, after)], [(received, before)], "test"), "test")
    found["exchanged"] = received
    comm = Comm(group)
    for size in (8, AHEAD_BYTES + 8):
        message = torch.zeros(size, dtype=torch.uint8)
        transfer = comm.receive(message, before)
        comm.send(torch.full((size,), rank + 1, dtype=torch.uint8), after)
        comm.wait(transfer)
        found[f"bytes {size}"] = message
    comm.flush()
    if rank == 0:
        group.send(mine * 7)
        wait = group.isend_tensor_dict({"a": mine, "n": 3})
        wait()
    elif rank == 1:
        found["sent"] = group.recv((2, 3), torch.float32)
        values, wait = group.irecv_tensor_dict()
        wait()
        found["dict"] = values
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_operations_of_groups(count: int) -> None:
    results = run_ranks(count, use_groups)
    ones = torch.ones(2, 3)
    total = float(sum(range(1, count + 1)))
    for rank, found in enumerate(results):
        before = (rank - 1) % count + 1
        assert torch.equal(found["sum"], ones * total)
        assert torch.equal(found["world"], ones * total)
        assert torch.equal(found["gathered"], torch.cat([ones * (other + 1) for other in range(count)]))
        assert torch.equal(found["complex"], found["gathered"].to(torch.complex64))
        assert torch.equal(found["first"], ones)
        assert torch.equal(found["scattered"], ones[None] * total)
        assert torch.equal(found["exchanged"], ones * before)
        assert all(found[f"bytes {size}"].eq(before).all() for size in (8, AHEAD_BYTES + 8))
    assert torch.equal(results[1]["sent"], ones * 7)
    assert results[1]["dict"]["n"] == 3
    assert torch.equal(results[1]["dict"]["a"], ones)


@pytest.mark.parametrize("axis", [axis for axis, (count, _) in AXES.items() if count == 2] + ["stages of slices"])
def test_every_axis(axis: str) -> None:
    tiny.resolve("tiny/flux")
    for distance in run_ranks(AXES[axis][0], run_axis, axis, "cpu"):
        assert distance <= (0 if axis in BITWISE else 1e-5)


def test_other_transports_are_refused() -> None:
    with pytest.raises(InputError, match="transport must be auto or host, got 'nccl'"):
        DiffusionParallelConfig(transport="nccl")
