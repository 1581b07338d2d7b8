"""`shardit.parallel_state`: groups by name, and their collective operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardit import InputError
from shardit import parallel_state as ps
from tests.diffusion.test_parallelize import join
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("name", [n for n in dir(ps) if n.startswith(("get_", "is_"))])
def test_before_initialisation(name: str) -> None:
    with pytest.raises(InputError, match="not initialised: call initialize_model_parallel"):
        getattr(ps, name)()


def axes(rank: int, count: int, method: str) -> dict[str, Any]:
    join(rank, count, method)
    ps.initialize_model_parallel(tensor_parallel_size=2, pipeline_parallel_size=2, timeout_s=30)
    assert ps.model_parallel_is_initialized()
    with pytest.raises(InputError, match="already"):
        ps.initialize_model_parallel()
    named = [("pp", ps.get_pp_group()), ("tp", ps.get_tp_group())]
    found = {
        "pp": (ps.get_pipeline_parallel_rank(), ps.get_pp_world_size(), ps.get_pp_group().ranks),
        "tp": (ps.get_tensor_model_parallel_rank(), ps.get_tp_world_size(), ps.get_tp_group().ranks),
        "sp": (ps.get_sequence_parallel_rank(), ps.get_sp_world_size(), ps.get_sp_group().ranks),
        "dp": (ps.get_dp_rank(), ps.get_dp_world_size(), ps.get_dp_group().ranks),
        "cfg": (ps.get_classifier_free_guidance_rank(), ps.get_classifier_free_guidance_world_size()),
        "ring x ulysses": (ps.get_ring_group().ranks, ps.get_ulysses_group().ranks),
        "world": ps.get_world_group().ranks,
        "mesh": (ps.get_device_mesh().mesh_dim_names, *map(ps.get_device_mesh().get_local_rank, ("pp", "tp"))),
        "mesh groups": [ps.get_device_mesh().get_group(axis) is group.device_group for axis, group in named],
        "ends": (ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage()),
    }
    ps.destroy_model_parallel()
    assert not ps.model_parallel_is_initialized()
    return found


def test_groups_of_every_axis() -> None:
    for rank, found in enumerate(run_ranks(4, axes)):
        stage, slice_ = divmod(rank, 2)
        assert found["pp"] == (stage, 2, (slice_, slice_ + 2))
        assert found["tp"] == (slice_, 2, (2 * stage, 2 * stage + 1))
        assert found["sp"] == (0, 1, (rank,))
        assert found["dp"] == (0, 1, (rank,))
        assert found["cfg"] == (0, 1)
        assert found["ring x ulysses"] == ((rank,), (rank,))
        assert found["world"] == (0, 1, 2, 3)
        assert found["mesh"] == (("pp", "tp"), stage, slice_)
        assert found["mesh groups"] == [True, True]
        assert found["ends"] == (stage == 0, stage == 1)


def operations(rank: int, count: int, method: str) -> None:
    join(rank, count, method)
    ps.initialize_model_parallel(cfg_parallel_size=count, timeout_s=30)
    group = ps.get_cfg_group()
    own = torch.full((2, 2), float(rank + 1))
    everything = [torch.full((2, 2), float(r + 1)) for r in range(count)]
    assert torch.equal(group.all_reduce(own.clone()), sum(everything))
    assert torch.equal(group.all_gather(own, dim=1), torch.cat(everything, 1))
    for got, expected in zip(group.all_gather(own, separate_tensors=True), everything, strict=True):
        assert torch.equal(got, expected)
    wide = torch.arange(2.0 * count).repeat(2, 1) + rank
    part = group.reduce_scatter(wide, dim=1)
    assert torch.equal(
        part, sum(torch.arange(2.0 * count).repeat(2, 1) + r for r in range(count)).chunk(count, 1)[rank]
    )
    with pytest.raises(InputError, match=f"length {2 * count + 1}"):
        group.reduce_scatter(torch.zeros(2 * count + 1))
    assert torch.equal(group.broadcast(own.clone(), src=1), everything[1])
    assert group.broadcast_object({"from": rank}, src=1) == {"from": 1}
    values = group.broadcast_tensor_dict({"a": own, "b": "text"} if rank == 1 else None, src=1)
    assert values["b"] == "text"
    assert torch.equal(values["a"], everything[1])
    before = (rank - 1) % count
    taken = group.isend_tensor_dict({"x": own, "n": rank})  # all ranks at once: it does not wait
    received, arrived = group.irecv_tensor_dict()
    arrived()
    taken()
    assert received["n"] == before
    assert torch.equal(received["x"], everything[before])
    if rank == 0:
        group.send(own, dst=1)
    elif rank == 1:
        assert torch.equal(group.recv((2, 2), torch.float32, src=0), everything[0])
    assert (group.next_rank, group.prev_rank) == ((rank + 1) % count, before)
    assert (group.is_first_rank, group.is_last_rank) == (rank == 0, rank == count - 1)
    group.barrier()


@pytest.mark.parametrize("count", [2, 3])
def test_operations(count: int) -> None:
    run_ranks(count, operations)


def branches_by_hand(rank: int, count: int, method: str) -> torch.Tensor:
    """Guidance as people write it by hand: rank 0 the positive branch, rank 1 the negative one."""
    join(rank, count, method)
    ps.initialize_model_parallel(cfg_parallel_size=2, timeout_s=30)
    group, latents = ps.get_cfg_group(), torch.arange(6.0).reshape(2, 3)
    for _ in range(3):
        mine = latents * 2 + 1 if ps.get_classifier_free_guidance_rank() == 0 else latents * 0.5
        positive, negative = group.all_gather(mine, separate_tensors=True)
        combined = negative + 4.0 * (positive - negative)
        combined = combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        latents = group.broadcast(latents - 0.1 * combined, src=0)
    return latents


def test_guidance_by_hand() -> None:
    first, second = run_ranks(2, branches_by_hand)
    latents = torch.arange(6.0).reshape(2, 3)
    for _ in range(3):
        positive, negative = latents * 2 + 1, latents * 0.5
        combined = negative + 4.0 * (positive - negative)
        latents = latents - 0.1 * combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
    assert torch.equal(first, second)
    assert torch.allclose(first, latents)
