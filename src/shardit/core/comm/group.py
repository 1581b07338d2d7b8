"""One group of ranks with the usual operations, ranks counted within the group."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardit.core.comm.mesh import AXES, Mesh
from shardit.errors import InputError, RankError


@dataclass(frozen=True, eq=False)
class GroupCoordinator:
    """`ranks` (global numbers, in order) and what they do together; src and dst are places within the group.

    device_group carries tensors on the device, cpu_group host objects (gloo). Both are None for one rank alone, for
    which every operation but send and receive does nothing. Every wait is bounded and ends in RankError.
    """

    rank: int
    ranks: tuple[int, ...]
    device: torch.device
    timeout: timedelta
    device_group: dist.ProcessGroup | None = None
    cpu_group: dist.ProcessGroup | None = None

    @staticmethod
    def of_mesh(mesh: Mesh) -> dict[str, GroupCoordinator]:
        """The groups of this rank on every axis, "sp" (ring x ulysses) and "world"."""

        def make(ranks: tuple[int, ...], device_group: Any = None, cpu_group: Any = None) -> GroupCoordinator:
            return GroupCoordinator(mesh.rank, ranks, mesh.device, mesh.timeout, device_group, cpu_group)

        found = {name: make((mesh.rank,)) for name in (*AXES, "sp", "world")}
        found |= {name: make(axis.ranks, axis.group, axis.control) for name, axis in mesh.axes.items()}
        if mesh.pp_size > 1:
            found["pp"] = make(mesh.pipeline.ranks, mesh.pipeline.back, mesh.pipeline.control)
        if mesh.world_size > 1:
            found["world"] = make(tuple(range(mesh.world_size)), dist.group.WORLD, dist.group.WORLD)
        return found

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def rank_in_group(self) -> int:
        """This rank's place."""
        return self.ranks.index(self.rank)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank comes first."""
        return self.rank == self.ranks[0]

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank comes last."""
        return self.rank == self.ranks[-1]

    @property
    def next_rank(self) -> int:
        """The global number of the rank after this one, in a circle."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """The global number of the rank before this one, in a circle."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    @property
    def device_communicator(self) -> GroupCoordinator:
        """What the collective operations are called on: this object."""
        return self

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the group, in place."""
        if self.world_size > 1:
            self._bounded(lambda: dist.all_reduce(tensor, group=self.device_group), "all_reduce")
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0, separate_tensors: bool = False) -> Any:
        """The tensors of all ranks (same shape), joined along `dim`, or as a list."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in self.ranks]
        if self.world_size == 1:
            parts = [tensor]
        else:
            own = tensor.contiguous()
            self._bounded(lambda: dist.all_gather(parts, own, group=self.device_group), "all_gather")
        return parts if separate_tensors else torch.cat(parts, dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The sum over the group, of which each rank gets its part along `dim`. Raises InputError where the length
        does not divide."""
        if tensor.shape[dim] % self.world_size:
            raise InputError(f"reduce_scatter: dim {dim} of length {tensor.shape[dim]} on {self.world_size} ranks")
        total = self.all_reduce(tensor.clone())
        return total.chunk(self.world_size, dim)[self.rank_in_group].contiguous()

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """What rank `src` of the group has, in place."""
        if self.world_size > 1:
            self._bounded(lambda: dist.broadcast(tensor, self.ranks[src], group=self.device_group), "broadcast")
        return tensor

    def broadcast_object(self, value: Any = None, src: int = 0) -> Any:
        """A picklable object of rank `src`."""
        box = [value]
        if self.world_size > 1:
            self._bounded(
                lambda: dist.broadcast_object_list(box, self.ranks[src], group=self.cpu_group), "broadcast_object"
            )
        return box[0]

    def broadcast_tensor_dict(self, values: dict[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
        """A dict of tensors and picklable values of rank `src`; tensors travel as tensors."""
        mine = self.rank_in_group == src
        described = self.broadcast_object(_describe(values or {}) if mine else None, src)
        out = dict(values or {}) if mine else _empty(described, self.device)
        for name in described[1]:
            out[name] = self.broadcast(out[name].contiguous(), src)
        return out

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Send to place `dst` of the group (default: the next)."""
        target = self.next_rank if dst is None else self.ranks[dst]
        self._bounded(lambda: dist.send(tensor.contiguous(), target, group=self.device_group), "send")

    def recv(self, size: Any, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """Receive a tensor of known size from place `src` of the group (default: the previous)."""
        source = self.prev_rank if src is None else self.ranks[src]
        tensor = torch.empty(size, dtype=dtype, device=self.device)
        self._bounded(lambda: dist.recv(tensor, source, group=self.device_group), "recv")
        return tensor

    def isend_tensor_dict(self, values: dict[str, Any], dst: int | None = None) -> Callable[[], None]:
        """Start sending a dict of tensors and picklable values; returns what waits until all is taken."""
        target = self.next_rank if dst is None else self.ranks[dst]
        described = _describe(values)
        said = torch.frombuffer(bytearray(pickle.dumps(described)), dtype=torch.uint8)
        head = [torch.tensor([len(said)]), said]
        tensors = [values[name].contiguous() for name in described[1]]
        parts = [(part, self.cpu_group) for part in head] + [(tensor, self.device_group) for tensor in tensors]
        works = [self._bounded(lambda: dist.isend(part, target, group=group), "send") for part, group in parts]  # noqa: B023
        return lambda: self._wait(works, head + tensors)

    def irecv_tensor_dict(self, src: int | None = None) -> tuple[dict[str, Any], Callable[[], None]]:
        """The dict that the other rank sends, and what waits until its tensors are filled. What the dict looks like is
        waited for at once."""
        source = self.prev_rank if src is None else self.ranks[src]
        length = torch.zeros(1, dtype=torch.int64)
        self._bounded(lambda: dist.recv(length, source, group=self.cpu_group), "receive")
        said = torch.empty(int(length), dtype=torch.uint8)
        self._bounded(lambda: dist.recv(said, source, group=self.cpu_group), "receive")
        described = pickle.loads(said.numpy().tobytes())
        values = _empty(described, self.device)
        tensors = [values[name] for name in described[1]]
        works = [self._bounded(lambda: dist.irecv(t, source, group=self.device_group), "receive") for t in tensors]  # noqa: B023
        return values, lambda: self._wait(works, tensors)

    def barrier(self) -> None:
        """Wait until every rank of the group is here."""
        if self.world_size > 1:
            self._bounded(lambda: dist.barrier(group=self.cpu_group), "barrier")

    def _wait(self, works: list[Any], alive: list[torch.Tensor]) -> None:
        for work in works:
            self._bounded(lambda: work.wait(self.timeout), "wait")  # noqa: B023
        del alive

    def _bounded(self, act: Callable[[], Any], what: str) -> Any:
        try:
            return act()
        except RuntimeError as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankError(self.rank, f"communication failed ({what}): {text}") from error


def _describe(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, torch.dtype]]]:
    """What is no tensor, and shape and dtype of what is."""
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    return plain, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _empty(
    described: tuple[dict[str, Any], dict[str, tuple[Any, torch.dtype]]], device: torch.device
) -> dict[str, Any]:
    plain, tensors = described
    return {**plain, **{n: torch.empty(shape, dtype=dtype, device=device) for n, (shape, dtype) in tensors.items()}}
