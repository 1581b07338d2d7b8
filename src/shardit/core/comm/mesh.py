"""The mesh: all axes of parallelism, this rank's place on them, and the process groups that go with it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardit.core.comm.malloc import keep_freed_memory
from shardit.errors import InputError, RankError, UnsupportedError

if TYPE_CHECKING:
    from shardit.config import DiffusionParallelConfig

AXES = ("dp", "cfg", "pp", "ring", "ulysses", "tp")
"""Outermost first: neighbouring ranks share `tp`, so that the axis that talks most gets the fastest links."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Communication back end by device type; ROCm devices call themselves cuda."""


@dataclass(frozen=True)
class Groups:
    """Process groups of ranks that work together; `ranks[i]` is the global rank of member i.

    `forward[(a, b)]` carries what flows from member a to member b of a chain of stages, `back` the results, and
    `control` small host-side objects (always gloo). They are separate so that no message waits behind one of another
    kind. A member alone has no groups.
    """

    ranks: tuple[int, ...]
    forward: dict[tuple[int, int], dist.ProcessGroup] = field(default_factory=dict, repr=False)
    back: dist.ProcessGroup | None = field(default=None, repr=False)
    control: dist.ProcessGroup | None = field(default=None, repr=False)

    def edge(self, source: int, target: int) -> dist.ProcessGroup | None:
        """The group for a hop between two stages; hops off the ring share `back`."""
        return self.forward.get((source, target), self.back)


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that differ from this one on one axis alone, in the order of that axis; `index`: this rank's place.
    `group` carries tensors on the device, `control` host objects (gloo)."""

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup = field(repr=False)
    control: dist.ProcessGroup = field(repr=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """Sizes of all axes, this rank's coordinates on them, its device and its groups.

    `timeout` bounds every wait. `pipeline`: the stages of this rank's chain. `replica`: all ranks that work on the same
    requests, that is all with its place on `dp`. `peers`: those of them with its place on `tp`, who hold
    the same slices. `axes`: by name, the axes of more than one rank; "sp" is ring and ulysses together.
    """

    sizes: dict[str, int]
    rank: int
    device: torch.device
    timeout: timedelta
    pipeline: Groups = field(default=Groups((0,)), repr=False)
    replica: Groups = field(default=Groups((0,)), repr=False)
    peers: Groups = field(default=Groups((0,)), repr=False)
    axes: dict[str, AxisGroup] = field(default_factory=dict, repr=False)

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of all axes."""
        return math.prod(self.sizes.values())

    @property
    def coords(self) -> dict[str, int]:
        """This rank's index on each axis."""
        return coordinates(self.sizes, self.rank)

    def member(self, **coords: int) -> int:
        """The number within `replica` of the rank that differs from this one in the given coordinates."""
        number = 0
        for axis, index in {**self.coords, **coords, "dp": 0}.items():
            number = number * self.sizes[axis] + index
        return number

    def device_mesh(self) -> DeviceMesh:
        """The axes of more than one rank as torch's DeviceMesh, over the groups that are there."""
        names = tuple(axis for axis in AXES if self.sizes[axis] > 1)
        if not names:
            raise InputError("there is one rank, which has no DeviceMesh")
        groups: list[Any] = [self.pipeline.back if axis == "pp" else self.axes[axis].group for axis in names]
        ranks = torch.arange(self.world_size).view([self.sizes[axis] for axis in names])
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    @property
    def pp_rank(self) -> int:
        """This rank's stage."""
        return self.coords["pp"]

    @property
    def pp_size(self) -> int:
        """Number of stages."""
        return self.sizes["pp"]


def axis_sizes(config: DiffusionParallelConfig) -> dict[str, int]:
    """The size of each axis, in the order of `AXES`."""
    return {
        "dp": config.data_parallel_size,
        "cfg": config.cfg_parallel_size,
        "pp": config.pipeline_parallel_size,
        "ring": config.ring_degree,
        "ulysses": config.ulysses_degree,
        "tp": config.tensor_parallel_size,
    }


def coordinates(sizes: dict[str, int], rank: int) -> dict[str, int]:
    """The index of `rank` on each axis; the last axis varies fastest."""
    coords: dict[str, int] = {}
    for axis in reversed(AXES):
        rank, coords[axis] = divmod(rank, sizes[axis])
    return {axis: coords[axis] for axis in AXES}


def axis_ranks(sizes: dict[str, int], *axes: str) -> list[tuple[int, ...]]:
    """All groups of ranks that differ only in their indices on `axes`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        coords = coordinates(sizes, rank)
        groups.setdefault(tuple(coords[a] for a in AXES if a not in axes), []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def pick_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    """The device of a rank: cuda where there is one, else cpu, unless given. Raises InputError, UnsupportedError."""
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in BACKENDS and kind not in os.environ.get("SHARDIT_ALLOW_DEVICE", "").split(","):
        raise UnsupportedError(
            f"device {kind!r} is not supported (use cpu or cuda); to try it, set SHARDIT_ALLOW_DEVICE={kind}"
        )
    if kind == "cpu":
        return torch.device("cpu")
    visible = getattr(torch, kind).device_count()
    if local_rank >= visible:
        other = "use fewer ranks, or show them more devices" if visible else "leave device out, or use cpu"
        raise InputError(
            f"more ranks than {kind} devices: rank {local_rank} of this machine, {visible} visible; {other}"
        )
    return torch.device(kind, local_rank)


def init_mesh(
    config: DiffusionParallelConfig,
    *,
    device: str | torch.device | None = None,
    timeout_s: float = 600,
    rank: int | None = None,
    init_method: str | None = None,
) -> Mesh:
    """Join the process group (starting it from `init_method` or the environment if there is none) and build the mesh.

    Collective over all ranks. Raises InputError where the world size is not the product of the axes.
    """
    sizes = axis_sizes(config)
    timeout = timedelta(seconds=timeout_s)
    wanted = config.world_size
    if wanted == 1 and not dist.is_initialized():
        return Mesh(sizes, 0, pick_device(device, 0), timeout)
    local_rank = int(os.environ.get("LOCAL_RANK", rank if rank is not None else os.environ.get("RANK", 0)))
    place = pick_device(device, local_rank)
    if not dist.is_initialized():
        _start(place, wanted, timeout, rank, init_method)
    if dist.get_world_size() != wanted:
        raise InputError(
            f"the process group has {dist.get_world_size()} ranks, but the configuration needs {wanted} "
            f"({' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1) or 'all axes 1'})"
        )
    if place.type == "cpu":
        keep_freed_memory()
    else:
        getattr(torch, place.type).set_device(place)
    mesh = Mesh(sizes, dist.get_rank(), place, timeout, *_make_groups(sizes, place, timeout))
    if place.type not in BACKENDS:
        check_p2p(mesh)
    return mesh


def _start(place: torch.device, world_size: int, timeout: timedelta, rank: int | None, init_method: str | None) -> None:
    backend = BACKENDS.get(place.type)
    if init_method is None and "RANK" not in os.environ:
        raise InputError("no process group: start under torchrun, or call torch.distributed.init_process_group first")
    kwargs = {} if init_method is None else {"init_method": init_method, "rank": rank, "world_size": world_size}
    if backend == "nccl":
        kwargs["device_id"] = place
    dist.init_process_group(backend, timeout=timeout, **kwargs)  # pyright: ignore[reportArgumentType]


def _make_groups(
    sizes: dict[str, int], place: torch.device, timeout: timedelta
) -> tuple[Groups, Groups, Groups, dict[str, AxisGroup]]:
    """All groups of all axes, made on every rank in the same order; returns those that this rank is in."""
    axes: dict[str, AxisGroup] = {}
    for name, members in {**{axis: (axis,) for axis in AXES if axis != "pp"}, "sp": ("ring", "ulysses")}.items():
        spread = [axis for axis in members if sizes[axis] > 1]
        if name == "sp" and len(spread) == 1:  # the other axis is 1: the ranks are the same
            axes["sp"] = axes[spread[0]]
        elif spread:
            axes[name] = _axis_group(axis_ranks(sizes, *members), place, timeout)
    made: dict[tuple[str, ...], Groups] = {}
    for members in (("pp",), AXES[1:-1], AXES[1:]):
        spread = tuple(axis for axis in members if sizes[axis] > 1)
        if spread not in made:
            made[spread] = _groups_of(sizes, spread, timeout)
    pipeline, peers, replica = (
        made[tuple(axis for axis in members if sizes[axis] > 1)] for members in (("pp",), AXES[1:-1], AXES[1:])
    )
    return pipeline, replica, peers, axes


def _axis_group(of_axis: list[tuple[int, ...]], place: torch.device, timeout: timedelta) -> AxisGroup:
    mine: AxisGroup | None = None
    me = dist.get_rank()
    for ranks in of_axis:
        group: Any = dist.new_group(list(ranks), timeout=timeout)
        control: Any = group
        if place.type != "cpu":
            control = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        if me in ranks:
            mine = AxisGroup(ranks, ranks.index(me), group, control)
    assert mine is not None
    return mine


def _groups_of(sizes: dict[str, int], axes: tuple[str, ...], timeout: timedelta) -> Groups:
    mine = Groups((dist.get_rank(),))
    for ranks in axis_ranks(sizes, *axes):
        size = len(ranks)
        if size == 1:
            continue
        # One communicator per directed edge: with two stages, 0 -> 1 and 1 -> 0 never queue behind each other.
        edges = [(s, (s + 1) % size) for s in range(size)] if axes == ("pp",) else []
        forward = {(a, b): dist.new_group([ranks[a], ranks[b]], timeout=timeout) for a, b in edges}
        back = dist.new_group(list(ranks), timeout=timeout)
        control = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            mine = Groups(ranks, forward, back, control)  # pyright: ignore[reportArgumentType]
    return mine


def check_p2p(mesh: Mesh) -> None:
    """Send a few bytes to the next rank and receive from the previous one, asynchronously and bounded in time.

    Raises RankError where the device's back end cannot do it. Used for device types that were opted in.
    """
    groups = mesh.replica
    me, size = groups.ranks.index(mesh.rank), len(groups.ranks)
    if size == 1:
        return
    bound = min(mesh.timeout, timedelta(seconds=30))
    for step in (1, -1):
        to, source = (me + step) % size, (me - step) % size
        out = torch.full((8,), float(me), device=mesh.device)
        got = torch.empty_like(out)
        try:
            works = [
                dist.irecv(got, groups.ranks[source], group=groups.back),
                dist.isend(out, groups.ranks[to], group=groups.back),
            ]
            for work in works:
                if work is not None:
                    work.wait(bound)
            value = float(got[0])
        except RuntimeError as error:
            raise RankError(mesh.rank, f"asynchronous P2P does not work on {mesh.device.type}: {error}") from error
        if value != float(source):
            raise RankError(mesh.rank, f"asynchronous P2P on {mesh.device.type} delivered {value}, not {source}")
