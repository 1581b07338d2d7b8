"""Distributes the tiles of a VAE over ranks: its unmodified code runs, and each rank computes its own tiles."""

from __future__ import annotations

import functools
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import view_bytes
from shardit.core.components.boundary import Boundary, Turn, unbound
from shardit.core.components.owned import empty, reader, run_on
from shardit.core.modules.attributes import Attributes
from shardit.core.modules.block_calls import BlockCalls, install
from shardit.core.modules.patching import subclass_in_place
from shardit.core.modules.small_tensors import ReplicatedTensors
from shardit.core.runtime.flat_call import FlatCall
from shardit.errors import InputError, RankError, first_filled_line
from shardit.parallel.vae.plan import TilePlan, find_tiles, placeholder
from shardit.parallel.vae.watch import Untileable

log = logging.getLogger(__name__)

PARTS = ("encoder", "decoder")
"""The costly parts of a VAE, with one call or several for each tile. All else is glue, which costs little."""


class _StopTiles(BaseException):
    """Leaves a VAE call when this rank has computed its last tile. Not an Exception: models may catch those."""


class Tiles:
    """One VAE whose tiles are assigned to the members `ranks` of `comm`; the first of them assembles the result.

    ran[t]: number of times this rank computed tile t of a call (0 for tiles of other ranks).
    """

    def __init__(
        self, module: nn.Module, comm: Comm, ranks: tuple[int, ...], small: ReplicatedTensors, attributes: Attributes
    ):
        self.module, self.comm, self.ranks, self.small, self.attributes = module, comm, ranks, small, attributes
        self.place = ranks.index(comm.rank) if comm.rank in ranks else None
        self.ran: Counter[int] = Counter()
        self._part_calls = BlockCalls()
        self._plans: dict[Any, TilePlan | str] = {}
        self._logged: set[str] = set()
        parts = [(name, getattr(module, name, None)) for name in PARTS]
        install([(name, part) for name, part in parts if isinstance(part, nn.Module)], self._part_calls)

    def call(
        self, path: str, name: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one call of the VAE or of a part of it, `plain(*args, **kwargs)`, on all ranks; each gets its result,
        with pending tensors."""
        first = self.ranks[0]
        if path or not isinstance(plain, MethodType):  # the behaviour of a replaced method is unknown
            return run_on(self.comm, first, plain, args, kwargs, self.small, self.attributes)
        plan = self._agree(name, plain, args, kwargs)
        if not isinstance(plan, TilePlan) or not plan.sharded:
            task: Callable[..., Any] = plain
        else:
            own = self._compute(plan, lambda: plain(*args, **kwargs))
            if self.place and own.numel():
                self.comm.wait(self.comm.send(own, first))
            task = functools.partial(self._replay, plan, own, plain)
        out = run_on(self.comm, first, task, args, kwargs, self.small, self.attributes)
        self._explain(name, plan)
        return out

    def _agree(self, name: str, plain: MethodType, args: Any, kwargs: Any) -> TilePlan | str | None:
        """Return the plan of a call, or the reason why there is none. Every rank with tiles finds it; all compare
        hashes of it."""
        plan = None if self.place is None else self._plan(name, plain, args, kwargs)
        gathered = self.comm.group.gather_objects(plan.digest if isinstance(plan, TilePlan) else plan)
        if len({gathered[rank] for rank in self.ranks}) > 1:
            reason = f"{self._name}.{name} falls into different tiles on different ranks"
            raise InputError(f"{reason}: call enable_tiling and disable_tiling alike on all of them")
        return plan

    def _plan(self, name: str, plain: MethodType, args: Any, kwargs: Any) -> TilePlan | str:
        key = (name, FlatCall.of(args, kwargs).signature(self.module.training), _settings(self.module))
        if key not in self._plans:
            try:
                found = find_tiles(plain.__func__, self.module, (args, kwargs), self._part_calls, len(self.ranks))
            except Exception as error:  # wrong arguments too: the VAE itself reports them when it runs
                found = first_filled_line(str(error)) or type(error).__name__
            self._plans[key] = found
        return self._plans[key]

    def _explain(self, name: str, plan: TilePlan | str | None) -> None:
        """Log once if ranks idle."""
        if self.place != 0 or plan is None:
            return
        ranks = len(self.ranks)
        tiles = len(plan.owners) if isinstance(plan, TilePlan) else 1
        if isinstance(plan, str):
            text = f"{self._name}.{name} runs on 1 of {ranks} ranks: {plan}"
        elif tiles < 2 and not getattr(self.module, "use_tiling", True):
            text = f"{self._name}.{name} runs on 1 of {ranks} ranks: its tiling is off"
        else:
            text = (
                f"{self._name}.{name}: number of tiles {tiles}, ranks {ranks}: some idle; lower "
                f"vae_patch_parallel_size{_smaller(self.module)}"
            )
        if tiles < ranks and text not in self._logged:
            self._logged.add(text)
            log.warning("%s", text)

    def _compute(self, plan: TilePlan, run: Callable[[], Any]) -> torch.Tensor:
        """Run the call up to this rank's last tile; return the message with its results."""
        assert self.place is not None
        compute = _Compute(plan, self.place, self.comm.group.device, self.ran)
        if compute.last < 0:
            return compute.message
        try:
            with self._part_calls.intercepted_by(compute), _kept(self.module), torch.no_grad():
                run()
        except _StopTiles:
            return compute.message
        except RankError:
            raise
        except Exception as error:  # the others wait for these tiles
            raise RankError(self.comm.group.rank, traceback.format_exc()) from error
        raise RankError(self.comm.group.rank, f"{self._name} made {compute.number} part calls of {len(plan.calls)}")

    def _replay(self, plan: TilePlan, own: torch.Tensor, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On the first rank: receive the results of the others, and run the call with these in place of the parts."""
        others = [torch.empty(m.total, dtype=torch.uint8, device=own.device) for m in plan.messages[1:]]
        pairs = zip(others, self.ranks[1:], strict=True)
        for transfer in [self.comm.receive(message, rank) for message, rank in pairs if message.numel()]:
            self.comm.wait(transfer)
        with self._part_calls.intercepted_by(_Replay(plan, [own, *others])), torch.no_grad():
            return plain(*args, **kwargs)

    @property
    def _name(self) -> str:
        return type(self.module).__name__


class _Compute:
    """Intercepts part calls and computes the tiles of one rank; those of other ranks are placeholders."""

    def __init__(self, plan: TilePlan, place: int, device: torch.device, ran: Counter[int]):
        self.plan, self.place, self.device, self.ran = plan, place, device, ran
        self.message = torch.empty(plan.messages[place].total, dtype=torch.uint8, device=device)
        self.number = 0
        self.last = max((n for n, call in enumerate(plan.calls) if plan.owners[call.tile] == place), default=-1)

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run instead of a part."""
        number, self.number = self.number, self.number + 1
        known = self.plan.calls[number]
        if self.plan.owners[known.tile] != self.place:
            leaves = [placeholder(leaf, self.device, n in known.sent) for n, leaf in enumerate(known.leaves)]
            return tree_unflatten(leaves, known.spec)
        out = call(*args, **kwargs)
        self.ran[known.tile] += 1
        leaves, _ = tree_flatten(out)
        for n in known.sent:
            # A copy, since glue may write to a tile (blending does), here on top of placeholders.
            _part(self.plan, self.place, self.message, number, n).copy_(_checked(leaves[n], known.leaves[n]))
        if number == self.last:
            raise _StopTiles
        return out


class _Replay:
    """Intercepts part calls and returns the results of all ranks."""

    def __init__(self, plan: TilePlan, messages: list[torch.Tensor]):
        self.plan, self.messages = plan, messages
        self.number = 0

    def block_call(self, index: int, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run instead of a part."""
        number, self.number = self.number, self.number + 1
        known = self.plan.calls[number]
        place = self.plan.owners[known.tile]
        leaves: list[Any] = []
        for n, leaf in enumerate(known.leaves):
            if n in known.sent:
                leaves.append(_part(self.plan, place, self.messages[place], number, n))
            else:
                leaves.append(placeholder(leaf, self.messages[0].device, False))
        return tree_unflatten(leaves, known.spec)


def _part(plan: TilePlan, place: int, message: torch.Tensor, call: int, leaf: int) -> torch.Tensor:
    """Return the place in a rank's message for one leaf of one part call."""
    start, _ = plan.messages[place].parts[plan.at[call, leaf]]
    found = plan.calls[call].leaves[leaf]
    assert found.dtype is not None
    return view_bytes(message, start, found.dtype, found.size, found.stride)


def _checked(tensor: torch.Tensor, leaf: Any) -> torch.Tensor:
    if tuple(tensor.shape) != leaf.size or tensor.dtype != leaf.dtype:
        raise Untileable(f"a tile is {tuple(tensor.shape)} {tensor.dtype}, not {leaf.size} {leaf.dtype}")
    return tensor


def _smaller(module: nn.Module) -> str:
    """Return the advice for smaller tiles, from Python: the VAE's attributes for tile sizes."""
    sizes = [f"{name}={value}" for name, value in vars(module).items() if name.startswith("tile_") and "min" in name]
    return f", or set smaller tiles of the VAE with shardit.parallelize ({', '.join(sizes)})" if sizes else ""


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return the plain attributes of a VAE: whether it tiles, tile sizes and strides."""
    plain = (bool, int, float, str, tuple, type(None))
    return tuple(sorted((name, repr(v)) for name, v in vars(module).items() if isinstance(v, plain)))


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of a VAE afterwards: a call that is left early leaves its caches modified."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before)


def shard_tiles(
    module: nn.Module,
    comm: Comm,
    ranks: tuple[int, ...],
    replicated: Collection[str] = (),
    shared: Collection[int] = (),
    turn: Turn = unbound,
) -> Tiles:
    """Share the tiles of a VAE between the members `ranks` of `comm`, in place, and enable its tiling. Other ranks keep
    its shape on meta and get its outputs, but have the tensors that are on every rank (`replicated` by name, `shared`
    by id). `turn`: see Boundary."""
    if comm.rank not in ranks:
        empty(module, replicated, shared)
    module.enable_tiling()  # pyright: ignore[reportCallIssue]
    small = ReplicatedTensors(module, replicated)
    tiles = Tiles(module, comm, ranks, small, Attributes(lambda: boundary.reached))
    boundary = Boundary(comm.group.device, tiles.call, reader(module, comm, ranks[0], small), turn=turn)
    boundary.install(module, "")
    subclass_in_place(module, {"shardit_tiles": property(lambda self: tiles)})
    return tiles
