"""One group of ranks with the usual operations; ranks are counted within the group."""

from __future__ import annotations

import functools
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from shardit.core.comm.host_group import HostGroup
from shardit.errors import InputError, RankError, first_line

if TYPE_CHECKING:
    from shardit.core.comm.mesh import Mesh

EXCHANGE = 2
"""The tag of `gather_bytes`, which shares a group with other messages."""
FEW = 4
"""Largest number of ranks for which small messages are exchanged pairwise."""
PACKET = 4096
"""Bytes of an object that the first message of a broadcast carries."""
_LENGTH = struct.Struct("q")
Addressed = tuple[torch.Tensor, int]
"""A tensor, and the place in the group that it goes to or comes from."""


@dataclass(frozen=True, eq=False)
class GroupCoordinator:
    """The group of `ranks` (global numbers, in order) and its operations; src and dst are places within the group.

    device_group carries tensors on the device, cpu_group host objects (gloo). Both are None for one rank alone, for
    which every operation but send and receive does nothing. edges[(a, b)] carries the messages from place a to place b
    of a chain of stages, so that no message waits behind one of another kind. posted: receives that are posted before
    somebody asks for them, by source and path, and spare: buffers for more of them; all users of the group share both.
    axis: its name in messages. Every wait is bounded and ends in RankError.
    """

    rank: int
    ranks: tuple[int, ...]
    device: torch.device
    timeout: timedelta
    device_group: dist.ProcessGroup | HostGroup | None = field(default=None, repr=False)
    cpu_group: dist.ProcessGroup | None = field(default=None, repr=False)
    edges: dict[tuple[int, int], dist.ProcessGroup | HostGroup] = field(default_factory=dict, repr=False)
    posted: dict[tuple[int, bool], Any] = field(default_factory=dict, repr=False)
    spare: list[torch.Tensor] = field(default_factory=list, repr=False)
    axis: str = ""

    @staticmethod
    def of_mesh(mesh: Mesh) -> dict[str, GroupCoordinator]:
        """Return the groups of this rank on every axis, "sp" (ring x ulysses) and "world"."""
        alone = GroupCoordinator(mesh.rank, (mesh.rank,), mesh.device, mesh.timeout)
        found = dict.fromkeys((*mesh.sizes, "sp", "world"), alone) | mesh.axes | {"pp": mesh.pipeline}
        if mesh.world_size > 1:
            world = tuple(range(mesh.world_size))
            group: Any = dist.group.WORLD
            if isinstance(mesh.replica.device_group, HostGroup) or isinstance(mesh.pipeline.device_group, HostGroup):
                group = HostGroup(group)
            found["world"] = replace(alone, ranks=world, device_group=group, cpu_group=dist.group.WORLD)
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
        """Whether this rank is the first."""
        return self.rank == self.ranks[0]

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank is the last."""
        return self.rank == self.ranks[-1]

    @property
    def next_rank(self) -> int:
        """The global number of the rank after this one, in a circle."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """The global number of the rank before this one, in a circle."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place."""
        if self.world_size > 1:
            self.wait([self.start("all_reduce", lambda group: group.allreduce([tensor]))], "all_reduce")
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0, separate_tensors: bool = False) -> Any:
        """Gather the tensors of all ranks (same shape), joined along `dim`, or as a list."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in self.ranks]
        if self.world_size == 1:
            parts = [tensor]
        else:
            own = tensor.contiguous()
            self.wait([self.start("all_gather", lambda group: group.allgather([parts], [own]))], "all_gather")
        return parts if separate_tensors else torch.cat(parts, dim)

    def reduce_scatter(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Sum over the group and return this rank's part along `dim`. Raises InputError if the length is not
        divisible."""
        if tensor.shape[dim] % self.world_size:
            raise InputError(f"reduce_scatter: dim {dim} of length {tensor.shape[dim]} on {self.world_size} ranks")
        total = self.all_reduce(tensor.clone())
        return total.chunk(self.world_size, dim)[self.rank_in_group].contiguous()

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Broadcast the tensor of rank `src` of the group, in place."""
        if self.world_size > 1:
            self.wait([self.start("broadcast", lambda group: group.broadcast(tensor, src))], "broadcast")
        return tensor

    def broadcast_object(self, value: Any = None, src: int = 0) -> Any:
        """Broadcast a picklable object of rank `src`: in one message, or in two if it is large."""
        if self.world_size == 1:
            return value
        mine = self.rank_in_group == src
        content = pickle.dumps(value) if mine else b""
        first = bytearray(_LENGTH.pack(len(content)) + content[:PACKET].ljust(PACKET))
        self._broadcast_bytes(first, src)
        (length,) = _LENGTH.unpack_from(first)
        rest = bytearray(content[PACKET:] if mine else bytes(max(0, length - PACKET)))
        if rest:
            self._broadcast_bytes(rest, src)
        return value if mine else pickle.loads((first[_LENGTH.size :] + rest)[:length])

    def _broadcast_bytes(self, content: bytearray, src: int) -> None:
        group, tensor = cast("dist.ProcessGroup", self.cpu_group), torch.frombuffer(content, dtype=torch.uint8)
        self.wait([self.call(lambda: group.broadcast(tensor, src), "broadcast")], "broadcast")

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather the picklable objects of all ranks, in their order, on every rank."""
        out: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            self.call(lambda: dist.all_gather_object(out, value, group=self.cpu_group), "gather")
        return out

    def gather_on_first(self, value: Any) -> list[Any]:
        """Gather the picklable objects of all ranks, in their order, on the first; [] on the others."""
        if self.world_size == 1:
            return [value]
        out = [None] * self.world_size if self.is_first_rank else None
        self.call(lambda: dist.gather_object(value, out, self.ranks[0], group=self.cpu_group), "gather")
        return out or []

    def gather_bytes(self, value: bytes) -> list[bytes]:
        """Gather the bytes of all ranks, in their order, on every rank; all give the same number, so this is one
        message."""
        if self.world_size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        out = [torch.empty_like(mine) for _ in self.ranks]
        gather = self._exchange if self.world_size <= FEW else functools.partial(dist.all_gather, group=self.cpu_group)
        self.call(lambda: gather(out, mine), "gather")
        out[self.rank_in_group] = mine
        return [one.numpy().tobytes() for one in out]

    def _exchange(self, out: list[torch.Tensor], mine: torch.Tensor) -> None:
        """Send from each rank to each other: with few ranks that takes a third of the time of an all-gather."""
        group, others = self.cpu_group, [rank for rank in self.ranks if rank != self.rank]
        places = [out[self.ranks.index(rank)] for rank in others]
        works = [dist.irecv(place, r, group=group, tag=EXCHANGE) for place, r in zip(places, others, strict=True)]
        works += [dist.isend(mine, rank, group=group, tag=EXCHANGE) for rank in others]
        for work, rank in zip(works, [*others, *others], strict=True):
            assert work is not None
            try:
                work.wait(self.timeout)
            except RuntimeError as error:
                text = "it makes no call and this rank does; every rank has to call the pipeline or model alike"
                raise RankError(rank, f"{text} ({first_line(error)})") from error

    def broadcast_tensor_dict(self, values: dict[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
        """Broadcast a dict of tensors and picklable values of rank `src`; tensors are sent as tensors."""
        mine = self.rank_in_group == src
        described = self.broadcast_object(_describe(values or {}) if mine else None, src)
        out = dict(values or {}) if mine else _empty(described, self.device)
        for name in described[1]:
            out[name] = self.broadcast(out[name].contiguous(), src)
        return out

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Send to place `dst` of the group (default: the next)."""
        whole, place = tensor.contiguous(), self.ranks.index(self.next_rank) if dst is None else dst
        self.wait([self.start("send", lambda group: group.send([whole], place, 0))], "send", whole)

    def recv(self, size: Any, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """Receive a tensor of known size from place `src` of the group (default: the previous)."""
        place = self.ranks.index(self.prev_rank) if src is None else src
        tensor = torch.empty(size, dtype=dtype, device=self.device)
        self.wait([self.start("recv", lambda group: group.recv([tensor], place, 0))], "recv")
        return tensor

    def exchange(self, sends: Sequence[Addressed], receives: Sequence[Addressed], what: str) -> list[Any]:
        """Start messages of tensors to and from places of the group, and return their handles. All are contiguous.
        Empty ones do not travel, as both sides know that they are empty."""
        sends, receives = [one for one in sends if one[0].numel()], [one for one in receives if one[0].numel()]
        if not self._is_direct and not isinstance(self.device_group, HostGroup):
            ops = [dist.P2POp(dist.isend, tensor, self.ranks[place], self.device_group) for tensor, place in sends]
            ops += [dist.P2POp(dist.irecv, tensor, self.ranks[place], self.device_group) for tensor, place in receives]
            return self.call(lambda: dist.batch_isend_irecv(ops), what) if ops else []

        def start(group: Any) -> list[Any]:
            """Post receives first, since gloo sends nothing before; the functions of torch.distributed take longer."""
            works = [group.recv([_real(tensor)], place, 0) for tensor, place in receives]
            return works + [group.send([_real(tensor)], place, 0) for tensor, place in sends]

        return self.start(what, start)

    def start_all_reduce(self, tensor: torch.Tensor) -> Any:
        """Start a sum over the group, in place, and return its handle."""
        if self._is_direct or isinstance(self.device_group, HostGroup):
            return self.start("all-reduce", lambda group: group.allreduce([tensor]))
        return self.call(lambda: dist.all_reduce(tensor, group=self.device_group, async_op=True), "all-reduce")

    @property
    def _is_direct(self) -> bool:
        """Whether methods of the torch group are called, which takes half the time of the functions of
        torch.distributed. torch.compile knows only those; it makes this False in code that it compiles."""
        return self.device.type == "cpu" and not torch.compiler.is_compiling()

    def start(self, what: str, begin: Callable[[Any], Any]) -> Any:
        """Begin an operation of the torch group, of which `begin` returns the handle."""
        return self.call(lambda: begin(self.device_group), what)

    def isend_tensor_dict(self, values: dict[str, Any], dst: int | None = None) -> Callable[[], None]:
        """Start sending a dict of tensors and picklable values; returns a function that waits until all is received."""
        target = self.next_rank if dst is None else self.ranks[dst]
        described = _describe(values)
        header = torch.frombuffer(bytearray(pickle.dumps(described)), dtype=torch.uint8)
        head = [torch.tensor([len(header)]), header]
        tensors = [values[name].contiguous() for name in described[1]]
        works = [self.call(lambda: dist.isend(part, target, group=self.cpu_group), "send") for part in head]  # noqa: B023
        works += self.exchange([(tensor, self.ranks.index(target)) for tensor in tensors], [], "send")
        return lambda: self.wait(works, "send", head + tensors)

    def irecv_tensor_dict(self, src: int | None = None) -> tuple[dict[str, Any], Callable[[], None]]:
        """Return the dict that the other rank sends, and a function that waits until its tensors are filled. Waits at
        once for the description of the dict."""
        source = self.prev_rank if src is None else self.ranks[src]
        length = torch.zeros(1, dtype=torch.int64)
        self.call(lambda: dist.recv(length, source, group=self.cpu_group), "receive")
        header = torch.empty(int(length), dtype=torch.uint8)
        self.call(lambda: dist.recv(header, source, group=self.cpu_group), "receive")
        described = pickle.loads(header.numpy().tobytes())
        values = _empty(described, self.device)
        tensors = [values[name] for name in described[1]]
        works = self.exchange([], [(tensor, self.ranks.index(source)) for tensor in tensors], "receive")
        return values, lambda: self.wait(works, "receive", tensors)

    def barrier(self) -> None:
        """Wait until every rank of the group is here."""
        if self.world_size > 1:
            self.call(lambda: dist.barrier(group=self.cpu_group), "barrier")

    def wait(self, works: Sequence[Any], what: str, alive: Any = None) -> None:
        """Wait for messages; `alive` holds their memory until then."""
        for work in works:
            self.call(lambda: work.wait(self.timeout), what)  # noqa: B023
        del alive

    def call(self, act: Callable[[], Any], what: str) -> Any:
        """Call a function of torch.distributed; raises RankError if it fails."""
        try:
            return act()
        except RankError:
            raise
        except RuntimeError as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            along = f" along {self.axis}" if self.axis else ""
            raise RankError(self.rank, f"communication failed ({what}{along}): {text}{_advice(text)}") from error


def _advice(text: str) -> str:
    """Return the place to look for the cause of a failed message, which lies on another rank."""
    if "closed by peer" in text or "reset by peer" in text:
        return "; another rank has failed or ended, see its own error"
    if "imed out" in text:
        return (
            "; another rank waits elsewhere: all ranks have to make the same calls and use their results, also in "
            "callbacks and hooks"
        )
    return ""


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _describe(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, torch.dtype]]]:
    """Return the plain values, and shape and dtype of each tensor."""
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in values.items() if name not in tensors}
    return plain, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def _empty(
    described: tuple[dict[str, Any], dict[str, tuple[Any, torch.dtype]]], device: torch.device
) -> dict[str, Any]:
    plain, tensors = described
    return {**plain, **{n: torch.empty(shape, dtype=dtype, device=device) for n, (shape, dtype) in tensors.items()}}
