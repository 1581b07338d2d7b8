"""`stages`: a model and a loss function over stages, with the gradients of one rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardit.config import TIMEOUT_S, DiffusionParallelConfig, config_of
from shardit.core.comm.mesh import Mesh, init_mesh
from shardit.core.comm.p2p import Comm
from shardit.core.modules.block_calls import install
from shardit.core.modules.blocks import CutModel, find_blocks
from shardit.core.modules.compiled import compiled_around, unwrap_parts
from shardit.core.modules.hints import Plan
from shardit.core.modules.patching import SWAPPED
from shardit.core.runtime.digests import digests
from shardit.core.runtime.randomness import generators_kept
from shardit.core.training.cut_loss import CutLoss
from shardit.core.training.gradients.sums import GradientSums, sum_gradients
from shardit.core.training.schedules import DEFERRING
from shardit.core.training.segment import StepData
from shardit.errors import InputError, UnsupportedError
from shardit.training.block_chunks import placing
from shardit.training.limits import check_degrees
from shardit.training.plan_step import StepPlan, plan_step
from shardit.training.save import save_model
from shardit.training.tensor import Loss, slice_model, watching_reads

_log = logging.getLogger("shardit")


def stages(
    model: nn.Module,
    loss: Loss,
    config: DiffusionParallelConfig | None = None,
    *,
    schedule: str = "1f1b",
    example: Any = None,
    plan: Plan | None = None,
    check_gradients: bool = True,
    timeout_s: float = TIMEOUT_S,
    **parallel: Any,
) -> Stages:
    """Cut a model into stages, and the weights of each over tensor ranks, for training; works in place.

    Collective: every rank holds the same model and calls this, and later `step`, alike. The process group is started
    from the environment (torchrun) if there is none. Weights are cut over tensor ranks at once. After the first step,
    or at once if an `example` micro-batch is given, each rank keeps the blocks that it owns, and no others. It may have
    others on meta from the start.

    loss: loss(model, micro_batch) returns a tensor with one number. schedule: "gpipe", "1f1b", "interleaved",
    "interleaved-zb" or "zbv".
    example: a micro-batch; needed if blocks run in another order than that of their registration, and `parameters`
    is called before the first step. plan: overrides what is found in the model. check_gradients: before the first step,
    compare the gradients of one micro-batch with those without a schedule, and raise UnsupportedError if they differ;
    the loss is called more often. timeout_s bounds every wait.
    parallel: fields of the configuration as keywords, in its place.

    Raises InputError if something does not fit, UnsupportedError if it cannot be done right.
    """
    own = ("model", "loss", "config", "schedule", "example", "plan", "check_gradients", "timeout_s")
    config = config_of(config, parallel, "stages", own)
    check_degrees(config, schedule)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    mesh = init_mesh(config, device=device, timeout_s=timeout_s)
    made = Stages(model, loss, config, mesh, schedule, plan, check_gradients)
    if example is not None:
        made._settle(example)
    return made


class Stages:
    """A model and its loss over stages, tensor ranks and replicas. All methods are collective but `parameters` and
    `named_parameters`. slices: the cuts of its weights over tensor ranks."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        config: DiffusionParallelConfig,
        mesh: Mesh,
        schedule: str,
        plan: Plan | None,
        check_gradients: bool,
    ):
        self.model, self.config, self.mesh = model, config, mesh
        if SWAPPED in vars(type(model)):
            raise InputError(f"{type(model).__name__} is parallel already: build the model again for stages()")
        comm = Comm(mesh.pipeline)
        blocks = _blocks_of(model, plan, comm.size, mesh.sizes["tp"])
        _compare_weights(model, mesh)
        place = placing(model, [block for _, block in blocks], config, schedule)  # the same on all tensor ranks
        self.slices = slice_model(model, mesh)
        cut = CutModel(model, blocks, [0] * len(blocks))
        if comm.size > 1:
            install(blocks, cut.calls)
        if place.note is not None and mesh.rank == 0:
            _log.warning("%s", place.note)
        loss = watching_reads(model, loss, self.slices)
        self.cut_loss = CutLoss(cut, loss, comm, mesh.replica, schedule, place, plan, check_gradients)
        self._sums: GradientSums | None = None

    def step(
        self,
        micro_batches: Sequence[Any],
        weights: Sequence[float] | torch.Tensor | None = None,
        *,
        example: Any = None,
    ) -> torch.Tensor:
        """Add the gradients of the mean loss of the micro-batches to those of the parameters; return the mean.

        All ranks of a replica get the same micro-batches, replicas their own; the mean is over those of all replicas,
        by `weights` (say, numbers of tokens) if they are given. A micro-batch of weight 0 is left out. A replica may
        have none in a step, if it gives an `example` of them.
        """
        planned = plan_step(micro_batches, weights, self.mesh, self.cut_loss.state(), example)
        self._settle(planned.first, next(iter(planned.seeds), 0))
        before = self._take_gradients()
        sums = self._replica_sums()
        try:
            if sums is not None:
                sums.begin(len(planned.batches))
            with generators_kept(self.mesh.device), torch.enable_grad():
                total = self.cut_loss.step(self._data(planned))
            self._sum_gradients(sums)
        finally:
            _add_gradients(before)
        return self._mean(total)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters that this rank owns, with their names in the model: slices of them on tensor ranks."""
        yield from self.cut_loss.holdings.own.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that this rank owns; those outside of the blocks are on every rank."""
        yield from self.cut_loss.holdings.own.values()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their norm over all ranks is at most `max_norm`; return the norm before."""
        norm = self.grad_norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter.grad.dtype))
        return norm.float()

    def grad_norm(self) -> torch.Tensor:
        """Return the norm of the gradients over all stages and tensor ranks, in float64."""
        held, comm = self.cut_loss.holdings, self.cut_loss.comm
        mine = {name: parameter for name, parameter in held.own.items() if held.owner[name] == comm.rank}
        return self._over_ranks(self.slices.squares(mine).to(self.mesh.device)).sqrt()

    def save_pretrained(self, folder: str | os.PathLike[str], also: Callable[[Path], object] | None = None) -> None:
        """Save the model as one ordinary folder of its library, with original names; a model with an adapter of peft
        as one LoRA file. The first rank writes it, under another name until it is complete.

        also: writes further files, such as those of a tokenizer, into the folder that it is given.

        Raises InputError on all ranks if it cannot be written.
        """
        problem = None
        if self.mesh.coords["dp"] == 0:
            problem = save_model(self.model, self.cut_loss, self.slices, Path(folder), also)
        for axis in ("tp", "dp"):
            if axis in self.mesh.axes:
                problem = self.mesh.axes[axis].broadcast_object(problem, 0)
        if problem is not None:
            raise InputError(problem)

    def _settle(self, example: Any, seed: int = 0) -> None:
        """Before the first step: settle which stage has what, on all replicas alike."""
        if self.cut_loss.dropped or self.cut_loss.comm.size == 1:
            return
        self.cut_loss.prepare(example, seed)
        owners, replicas = self.cut_loss.cut.owners, self.mesh.axes.get("dp")
        if replicas is not None and any(one != owners for one in replicas.gather_objects(owners)):
            raise UnsupportedError("blocks run in another order on other replicas: give stages() the same example=")

    def _take_gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        """Set gradients of earlier steps aside: they are sums over ranks already."""
        before = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        for parameter in before:
            parameter.grad = None
        return before

    def _replica_sums(self) -> GradientSums | None:
        """Return the sums over replicas of those parameters that no other stage has."""
        replicas, held = self.mesh.axes.get("dp"), self.cut_loss.holdings
        if replicas is None:
            return None
        shared = {id(parameter) for parameter in held.shared.values()}
        own = [parameter for parameter in held.trainable() if id(parameter) not in shared]
        if self._sums is None or list(map(id, own)) != list(map(id, self._sums.parameters)):
            if self._sums is not None:
                self._sums.remove()
            # Hooks on weights would keep zero-bubble schedules from deferring their gradients.
            self._sums = GradientSums(own, replicas, early=self.cut_loss.kind not in DEFERRING)
        return self._sums

    def _sum_gradients(self, sums: GradientSums | None) -> None:
        """Sum the gradients of shared parameters over stages, of whole ones over tensor ranks, all over replicas."""
        held, comm = self.cut_loss.holdings, self.cut_loss.comm
        if sums is not None:
            sums.finish()  # first: some of its messages are on their way
        shared = list(held.shared.values())
        sum_gradients(shared, comm.group)
        if sums is not None:
            own = [parameter for parameter in shared if parameter.requires_grad and not parameter.is_meta]
            sum_gradients(own, sums.group)
        self.slices.sum_gradients(held.own)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        replicas, total = self.mesh.axes.get("dp"), self._over_ranks(total)
        return (total if replicas is None else replicas.all_reduce(total)).float()

    def _over_ranks(self, number: torch.Tensor) -> torch.Tensor:
        """Sum a number over the stages and tensor ranks of this replica."""
        for group in (self.cut_loss.comm.group, self.mesh.axes.get("tp")):
            number = number if group is None else group.all_reduce(number)
        return number

    def _data(self, planned: StepPlan) -> StepData:
        """Return the micro-batches of a step. The loss of each is the mean of those that the tensor ranks compute."""
        factors = [factor / self.slices.count for factor in planned.factors]
        return StepData(planned.batches, factors, planned.seeds)


def _add_gradients(before: dict[nn.Parameter, torch.Tensor]) -> None:
    """Add the gradients of this step to those before."""
    for parameter, gradient in before.items():
        parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)


def _blocks_of(model: nn.Module, plan: Plan | None, stages: int, slices: int) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a model. Raises UnsupportedError if several stages or tensor ranks could not run them."""
    if stages == slices == 1:
        return find_blocks(model, plan)
    unwrap_parts(model)
    blocks = find_blocks(model, plan)
    if not blocks and stages > 1:
        raise UnsupportedError(f"{type(model).__name__} has no block lists to cut: use pipeline_parallel_size=1")
    if name := compiled_around(model, [block for _, block in blocks]):
        raise UnsupportedError(
            f"{name} is compiled, but its blocks run on several ranks: call compile() of each block in its place"
        )
    return blocks


def _compare_weights(model: nn.Module, mesh: Mesh) -> None:
    """Raise InputError if ranks start from different weights, as far as two of them have the same ones."""
    if mesh.world_size == 1:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    absent = {name: None for name, tensor in tensors.items() if tensor.is_meta}
    mine = {**digests({name: one for name, one in tensors.items() if name not in absent}), **absent}
    groups = [group for group in (mesh.replica, mesh.axes.get("dp")) if group is not None]
    of_ranks = [one for group in groups for one in group.gather_objects(mine)]
    found = [name for one in of_ranks for name in {**one, **mine} if _differ(one.get(name, b""), mine.get(name, b""))]
    for group in groups:  # other stages of two replicas may have the weights that differ
        found = [name for names in group.gather_objects(found[:1]) for name in names]
    if found:
        raise InputError(f"ranks have different weights ({found[0]}): seed alike, or load the same file, on every rank")


def _differ(one: bytes | None, other: bytes | None) -> bool:
    """Return whether two digests differ; None: a rank has no data to compare."""
    return one is not None and other is not None and one != other
