"""Cuts the weights of a trained model over tensor ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_structure

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.mesh import Mesh
from shardit.core.modules.patching import set_tensor
from shardit.core.placement.slices import Shards
from shardit.core.training.gradients.slices import TensorSlices
from shardit.core.training.micro_batch import tree_of
from shardit.diffusion.family import FAMILY
from shardit.errors import UnsupportedError
from shardit.language.tensor import plan_decoder
from shardit.parallel.tensor.adapters import base_linears
from shardit.parallel.tensor.apply import cut_model, notes_together, whole_share
from shardit.parallel.tensor.check.reads import refused_reads
from shardit.parallel.tensor.check.units import Checks
from shardit.parallel.tensor.gather_module import cuts_by_name
from shardit.parallel.tensor.plan import TensorPlan
from shardit.parallel.tensor.planner import plan_tensors

_log = logging.getLogger("shardit")

Loss = Callable[[Any, Any], torch.Tensor]

_LANGUAGE = ("transformers", "peft")
"""Libraries whose models are language models."""


def slice_model(model: nn.Module, mesh: Mesh) -> TensorSlices:
    """Cut a whole model, and the adapters on it, to this rank's slices, in place. Of a module around a trained one
    (`Joint`) that one is cut. Raises UnsupportedError for a model that cannot be cut."""
    group = mesh.axes.get("tp")
    if group is None:
        return TensorSlices()
    ranks = Collectives(group)
    ranks.trains = True
    inner = vars(model).get("denoiser_name", "")
    part: Any = model.get_submodule(inner)
    plan = _plan(part, ranks.size)
    title = type(part).__name__
    if mesh.rank == 0:
        with base_linears(part):
            share = whole_share(part, plan)
        for line in (*((share.sentence,) if share.much else ()), *notes_together(plan.notes)):
            _log.warning("%s: %s", title, line)
    _refuse_hooks(part, plan)
    before = dict(part.named_parameters(remove_duplicate=False))
    cut_model(part, plan, ranks, title)
    checks: Checks = part.shardit_checks
    checks.for_training = True
    found = cuts_by_name(part, plan, ranks.index)
    _keep_parameters(part, before, found, ranks.index)
    return TensorSlices({f"{inner}.{name}" if inner else name: cut for name, cut in found.items()}, ranks)


def watching_reads(model: nn.Module, loss: Loss, slices: TensorSlices) -> Loss:
    """Return a loss function whose first call with micro-batches of each structure refuses to read slices as if they
    were whole."""
    if slices.ranks is None:
        return loss
    inner: Any = model.get_submodule(vars(model).get("denoiser_name", ""))
    checks, seen = inner.shardit_checks, set[Any]()

    def watched(given: Any, batch: Any) -> torch.Tensor:
        key = model.training, torch.is_grad_enabled(), str(tree_structure(tree_of(batch)))
        if key in seen:
            return loss(given, batch)
        seen.add(key)
        with refused_reads(model, slices.cuts, checks):
            return loss(given, batch)

    return watched


def _refuse_hooks(model: nn.Module, plan: TensorPlan) -> None:
    """Raise UnsupportedError for hooks on the gradients of weights that are cut."""
    with base_linears(model):
        named = dict(model.named_parameters(remove_duplicate=False))
    for name in plan.cuts:
        one = named.get(name)
        if one is not None and (one._backward_hooks or getattr(one, "_post_accumulate_grad_hooks", None)):
            raise UnsupportedError(
                f"{name} has a hook on its gradient, of which each tensor rank has a slice: remove it, or use "
                "tensor_parallel_size=1"
            )


def _keep_parameters(model: nn.Module, before: dict[str, nn.Parameter], cuts: Mapping[str, Shards], rank: int) -> None:
    """Put the slices into the parameters that the model had, in place: an optimizer may have these already."""
    for name, held in before.items():
        made = model.get_parameter(name)
        if made is held:
            continue
        gradient, held.grad = held.grad, None
        held.data = made.data
        held.grad = None if gradient is None else cuts[name].of(rank).take(gradient)
        set_tensor(model, name, held)


def _plan(model: Any, size: int) -> TensorPlan:
    if type(model).__module__.partition(".")[0] in _LANGUAGE and hasattr(model, "get_output_embeddings"):
        plan = plan_decoder(model, size)
        assert plan is not None
        return plan
    with base_linears(model):
        return plan_tensors(model, size, FAMILY, must_cut=True)
