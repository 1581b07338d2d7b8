"""The mesh: all axes of parallelism, this rank's place on them, and their process groups."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardit.config import DEGREES, TIMEOUT_S, device_kind
from shardit.core.comm.group import GroupCoordinator
from shardit.core.comm.host_group import HostGroup
from shardit.core.comm.malloc import keep_freed_memory
from shardit.errors import InputError, RankError

if TYPE_CHECKING:
    from shardit.config import DiffusionParallelConfig

AXES = tuple(DEGREES)

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Communication back end by device type; ROCm devices are of type cuda."""


@dataclass(frozen=True)
class Mesh:
    """Sizes of all axes, this rank's coordinates on them, its device and its groups.

    `timeout` bounds every wait. `pipeline`: the stages of this rank's chain. `replica`: all ranks that work on the same
    requests: those with its place on `dp`. `peers`: the ranks of the replica with its place on `tp`, which have the
    same slices. `axes`: by name, the axes of more than one rank; "sp" is ring and ulysses together.
    """

    sizes: dict[str, int]
    rank: int
    device: torch.device
    timeout: timedelta
    pipeline: GroupCoordinator = field(repr=False)
    replica: GroupCoordinator = field(repr=False)
    peers: GroupCoordinator = field(repr=False)
    axes: dict[str, GroupCoordinator] = field(default_factory=dict, repr=False)

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of all axes."""
        return math.prod(self.sizes.values())

    @property
    def coords(self) -> dict[str, int]:
        """This rank's index on each axis."""
        return coordinates(self.sizes, self.rank)

    def member(self, **coords: int) -> int:
        """Return the number within `replica` of the rank that differs from this one in the given coordinates."""
        number = 0
        for axis, index in {**self.coords, **coords, "dp": 0}.items():
            number = number * self.sizes[axis] + index
        return number

    def device_mesh(self) -> DeviceMesh:
        """Return the axes of more than one rank as torch's DeviceMesh, over the existing groups."""
        names = tuple(axis for axis in AXES if self.sizes[axis] > 1)
        if not names:
            raise InputError("there is one rank, which has no DeviceMesh")
        found = [self.pipeline.device_group if axis == "pp" else self.axes[axis].device_group for axis in names]
        groups: list[Any] = [one.group if isinstance(one, HostGroup) else one for one in found]
        ranks = torch.arange(self.world_size).view([self.sizes[axis] for axis in names])
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=names)

    @property
    def keeps_graph(self) -> bool:
        """Whether calls of a model are recorded for gradients: slices record them, and refuse the backward."""
        return self.pp_size == 1 and not self.axes.keys() & {"cfg", "sp"}

    @property
    def pp_rank(self) -> int:
        """This rank's stage."""
        return self.coords["pp"]

    @property
    def pp_size(self) -> int:
        """Number of stages."""
        return self.sizes["pp"]


def axis_sizes(config: DiffusionParallelConfig) -> dict[str, int]:
    """Return the size of each axis, in the order of `AXES`."""
    return {axis: getattr(config, degree) for axis, degree in DEGREES.items()}


def coordinates(sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Return the index of `rank` on each axis; the last axis varies fastest."""
    coords: dict[str, int] = {}
    for axis in reversed(AXES):
        rank, coords[axis] = divmod(rank, sizes[axis])
    return {axis: coords[axis] for axis in AXES}


def axis_ranks(sizes: dict[str, int], *axes: str) -> list[tuple[int, ...]]:
    """Return all groups of ranks that differ only in their indices on `axes`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(math.prod(sizes.values())):
        coords = coordinates(sizes, rank)
        groups.setdefault(tuple(coords[a] for a in AXES if a not in axes), []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def pick_device(device: str | torch.device | None, local_rank: int, shared: bool = False) -> torch.device:
    """Return the device of a rank: cuda if available, else cpu, unless given. shared: several ranks may have the same.
    Raises InputError, UnsupportedError."""
    _check_allowed()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device_kind(device if isinstance(device, str) else torch.device(device).type)
    if kind == "cpu":
        return torch.device("cpu")
    visible = getattr(torch, kind).device_count()
    if shared and visible:
        local_rank %= visible
    if local_rank >= visible:
        other = 'use fewer ranks, show them more devices, or share them by transport="host"'
        other = other if visible else "leave device out, or use cpu"
        raise InputError(
            f"more ranks than {kind} devices: rank {local_rank} of this machine, {visible} visible; {other}"
        )
    return torch.device(kind, local_rank)


def _check_allowed() -> None:
    """Raise InputError for a type of SHARDIT_ALLOW_DEVICE that this torch does not know."""
    for kind in filter(None, os.environ.get("SHARDIT_ALLOW_DEVICE", "").split(",")):
        try:
            torch.device(kind)
        except RuntimeError:
            text = f"SHARDIT_ALLOW_DEVICE names {kind!r}, which this torch does not know as a type of devices"
            raise InputError(f"{text}; correct or unset it") from None


def init_mesh(
    config: DiffusionParallelConfig,
    *,
    device: str | torch.device | None = None,
    timeout_s: float = TIMEOUT_S,
    rank: int | None = None,
    init_method: str | None = None,
) -> Mesh:
    """Join the process group (starting it from `init_method` or the environment if there is none) and build the mesh.

    Collective over all ranks. Raises InputError if the world size is not the product of the axes.
    """
    sizes = axis_sizes(config)
    timeout = timedelta(seconds=timeout_s)
    wanted = config.world_size
    if wanted == 1 and not dist.is_initialized():
        place = pick_device(device, 0)
        alone = GroupCoordinator(0, (0,), place, timeout)
        return Mesh(sizes, 0, place, timeout, alone, alone, alone)
    local_rank = int(os.environ.get("LOCAL_RANK", rank if rank is not None else os.environ.get("RANK", 0)))
    host = config.transport == "host"
    place = pick_device(device, local_rank, host)
    if not dist.is_initialized():
        _start("gloo" if host else BACKENDS.get(place.type), place, wanted, timeout, rank, init_method)
    if dist.get_world_size() != wanted:
        raise InputError(
            f"the process group has {dist.get_world_size()} ranks, but the configuration needs {wanted} "
            f"({' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1) or 'all axes 1'})"
        )
    if place.type == "cpu":
        keep_freed_memory()
    else:
        getattr(torch, place.type).set_device(place)
    mesh = Mesh(sizes, dist.get_rank(), place, timeout, *_make_groups(sizes, place, timeout, host))
    if place.type not in BACKENDS and not host:
        check_p2p(mesh)
    return mesh


def _start(
    backend: str | None,
    place: torch.device,
    world_size: int,
    timeout: timedelta,
    rank: int | None,
    init_method: str | None,
) -> None:
    if init_method is None and "RANK" not in os.environ:
        raise InputError("no process group: start under torchrun, or call torch.distributed.init_process_group first")
    kwargs = {} if init_method is None else {"init_method": init_method, "rank": rank, "world_size": world_size}
    if backend == "nccl":
        kwargs["device_id"] = place
    dist.init_process_group(backend, timeout=timeout, **kwargs)  # pyright: ignore[reportArgumentType]


def _make_groups(
    sizes: dict[str, int], place: torch.device, timeout: timedelta, host: bool
) -> tuple[GroupCoordinator, GroupCoordinator, GroupCoordinator, dict[str, GroupCoordinator]]:
    """Make all groups of all axes, on every rank in the same order; return those of this rank."""
    axes: dict[str, GroupCoordinator] = {}
    for name, members in {**{axis: (axis,) for axis in AXES if axis != "pp"}, "sp": ("ring", "ulysses")}.items():
        wide = [axis for axis in members if sizes[axis] > 1]
        if name == "sp" and len(wide) == 1:  # the other axis is 1: the ranks are the same
            axes["sp"] = replace(axes[wide[0]], axis="sp")
        elif wide:
            axes[name] = _join(axis_ranks(sizes, *members), place, timeout, host, axis=name)
    made: dict[tuple[str, ...], GroupCoordinator] = {}
    for members in (("pp",), AXES[1:-1], AXES[1:]):
        wide = tuple(axis for axis in members if sizes[axis] > 1)
        if wide not in made:
            made[wide] = _join(axis_ranks(sizes, *wide), place, timeout, host, chain=wide == ("pp",))
    pipeline, peers, replica = (
        made[tuple(axis for axis in members if sizes[axis] > 1)] for members in (("pp",), AXES[1:-1], AXES[1:])
    )
    return pipeline, replica, peers, axes


def _join(
    groups: list[tuple[int, ...]],
    place: torch.device,
    timeout: timedelta,
    host: bool,
    *,
    axis: str = "",
    chain: bool = False,
) -> GroupCoordinator:
    """Make the torch groups of all `groups` of ranks; return the one of this rank. host: messages travel through host
    memory. chain: its ranks are stages of a pipeline."""
    new_group = functools.partial(dist.new_group, timeout=timeout, backend="gloo" if host else None)
    mine = GroupCoordinator(dist.get_rank(), (dist.get_rank(),), place, timeout)
    for ranks in groups:
        size = len(ranks)
        if size == 1:
            continue
        # One communicator per directed edge: with two stages, 0 -> 1 and 1 -> 0 never queue behind each other.
        hops = [(s, (s + 1) % size) for s in range(size)] if chain else []
        edges: Any = {(a, b): new_group([ranks[a], ranks[b]]) for a, b in hops}
        group: Any = new_group(list(ranks))
        control: Any = group  # all ranks of an axis do the same in the same order: objects need no group of their own
        if not axis or place.type != "cpu":
            control = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        if mine.rank in ranks:
            if host:
                group, edges = HostGroup(group), {hop: HostGroup(one) for hop, one in edges.items()}
            mine = replace(mine, ranks=ranks, device_group=group, cpu_group=control, edges=edges, axis=axis)
    return mine


def check_p2p(mesh: Mesh) -> None:
    """Send a few bytes to the next rank and receive from the previous one, asynchronously and bounded in time.

    Raises RankError if the device's back end does not support it. Used for device types that were opted in.
    """
    group = mesh.replica
    me, size = group.rank_in_group, group.world_size
    if size == 1:
        return
    bound = min(mesh.timeout, timedelta(seconds=30))
    for step in (1, -1):
        to, source = (me + step) % size, (me - step) % size
        out = torch.full((8,), float(me), device=mesh.device)
        got = torch.empty_like(out)
        try:
            for work in group.exchange([(out, to)], [(got, source)], "check"):
                work.wait(bound)
            value = float(got[0])
        except RuntimeError as error:
            raise RankError(mesh.rank, f"asynchronous P2P does not work on {mesh.device.type}: {error}") from error
        if value != float(source):
            raise RankError(mesh.rank, f"asynchronous P2P on {mesh.device.type} delivered {value}, not {source}")
