"""The schedules of torch.distributed.pipelining over the segments of a plan."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from shardit.core.comm.group import GroupCoordinator
from shardit.core.training.gradients.deferred import Deferred
from shardit.core.training.loss_plan import LossPlan
from shardit.core.training.segment import LossRun, Segment, StepData
from shardit.errors import InputError, RankError, UnsupportedError

CHUNKED = ("interleaved", "interleaved-zb", "zbv")
"""Schedules with several chunks a rank."""

DEFERRING = ("interleaved-zb", "zbv")
"""Schedules that compute weight gradients in the gaps."""


def owner_of_chunk(chunk: int, stages: int, kind: str) -> int:
    """Return the stage of a chunk."""
    return 2 * stages - 1 - chunk if kind == "zbv" and chunk >= stages else chunk % stages


class _Stage(PipelineStage):
    """A stage whose buffers for received tensors live no longer than their micro-batch."""

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        _drop(self.args_recv_info.values())

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(num_microbatches)
        _drop(self.grad_recv_info.values())

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        _allocate(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        if self.has_backward and not self.is_last:
            _allocate(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        _allocate(self.grad_recv_info[mb_index], self.device)  # torch sets what has no gradient to zero
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        _drop([self.args_recv_info[bwd_chunk_id], self.grad_recv_info.get(bwd_chunk_id, ())])


def _drop(infos: Any) -> None:
    for info in (one for of_chunk in infos for one in of_chunk):
        info.buffer = None


def _allocate(infos: Any, device: torch.device) -> None:
    for info in infos:
        if not info.is_root_arg and info.tensor_meta is not None:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


class _ShortSchedule1F1B(Schedule1F1B):
    """1F1B with fewer micro-batches than stages: torch's steps are right for them, but its constructor refuses them."""

    def __init__(self, stage: PipelineStage, n_microbatches: int, **options: Any):
        PipelineScheduleSingle.__init__(self, stage, n_microbatches, **options)

    def _get_pipeline_order(self) -> None:
        return None


_LOOPED: dict[str, Any] = {"gpipe": ScheduleLoopedBFS, "interleaved-zb": ScheduleInterleavedZeroBubble}


class Schedules:
    """The schedules of one plan, by number of micro-batches."""

    def __init__(self, run: LossRun, plan: LossPlan, group: GroupCoordinator, kind: str, deferred: Deferred):
        self.run, self.plan, self.group, self.kind, self.deferred = run, plan, group, kind, deferred
        self._made: dict[int, Any] = {}

    def step(self, indices: list[int], step: StepData) -> None:
        """Run forward and backward of some of the micro-batches of a step."""
        self.run.step = step
        try:
            with self.deferred.active():
                while indices:
                    count = self._fitting(len(indices))
                    self._run(indices[:count])
                    indices = indices[count:]
        finally:
            self.run.step = None

    def _fitting(self, count: int) -> int:
        """Return how many of `count` micro-batches the schedule takes at once: interleaved ones need whole rounds."""
        if self.kind in ("gpipe", "zbv") or not self._looped:
            return count
        return next(n for n in range(count, 0, -1) if n % max(1, n // self.group.world_size) == 0)

    @property
    def _looped(self) -> bool:
        return len(self.plan.segments) > self.group.world_size

    def _run(self, indices: list[int]) -> None:
        schedule = self._made.get(len(indices))
        if schedule is None:
            schedule = self._made[len(indices)] = self._make(len(indices))
        stages = schedule._stages if self._looped else [schedule._stage]
        numbers = torch.tensor(indices).view(-1, 1)
        inputs = [numbers.float()] if any(stage.is_first for stage in stages) else []
        target = numbers if any(stage.is_last for stage in stages) else None
        losses: list[torch.Tensor] | None = [] if target is not None else None
        try:
            schedule.step(*inputs, index=numbers, target=target, losses=losses, return_outputs=False)
        except RuntimeError as error:
            raise _cause(error, self.group.rank) from error

    def _make(self, count: int) -> Any:
        numbers = [n for n, owner in enumerate(self.plan.owners) if owner == self.group.rank_in_group]
        stages: list[Any] = [self._stage(number) for number in numbers]
        options: dict[str, Any] = {"loss_fn": lambda out, target: out, "scale_grads": False}
        if self.kind == "zbv":
            return ScheduleZBVZeroBubble(stages, count, **options)
        if self._looped:
            cls = _LOOPED.get(self.kind, ScheduleInterleaved1F1B)
            return cls(stages, count, **options)
        if self.kind == "gpipe":
            return ScheduleGPipe(stages[0], count, **options)
        short = count < self.group.world_size
        return (_ShortSchedule1F1B if short else Schedule1F1B)(stages[0], count, **options)

    def _stage(self, number: int) -> _Stage:
        # With static layouts torch runs no forward and backward of its own to find them.
        plan, total = self.plan, len(self.plan.segments)
        number_in = torch.empty(1, 1, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        return _Stage(
            Segment(self.run, plan, number),
            number,
            total,
            self.run.device,
            input_args=plan.messages(number - 1) if number else (number_in,),
            output_args=plan.messages(number) if number < total - 1 else (loss,),
            group=cast("dist.ProcessGroup | None", self.group.device_group),
            dw_builder=self.deferred.builder if self.kind in DEFERRING else None,
        )


def check_owners(owners: tuple[int, ...], stages: int, kind: str, names: list[str]) -> None:
    """Raise UnsupportedError if blocks do not run in an order that torch's schedules take: stage after stage."""
    wrong = len(owners) != 2 * stages if kind == "zbv" else len(owners) % stages
    if wrong or owners != tuple(owner_of_chunk(n, stages, kind) for n in range(len(owners))):
        raise UnsupportedError(
            f"the blocks run on stages {', '.join(map(str, owners))} one after the other, which torch's schedules do "
            f"not do (first blocks: {', '.join(names[:4])}): change schedule or layer_partition"
        )


def _cause(error: BaseException, rank: int) -> BaseException:
    """Return the error of the user's code that a schedule has wrapped; of communication, a RankError."""
    found = error
    while found.__cause__ is not None:
        found = found.__cause__
    if isinstance(found, (InputError, RankError)) or not isinstance(found, RuntimeError):
        return found
    return RankError(rank, f"{type(found).__name__}: {str(found).splitlines()[0] if str(found) else ''}")
