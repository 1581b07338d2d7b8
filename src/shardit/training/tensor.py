"""Cuts the weights of a trained model over tensor ranks."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from shardit.core.comm.collectives import Collectives
from shardit.core.comm.mesh import Mesh
from shardit.core.training.gradients.slices import TensorSlices
from shardit.diffusion.family import FAMILY
from shardit.language.tensor import plan_decoder
from shardit.parallel.tensor.adapters import base_linears
from shardit.parallel.tensor.apply import cut_model, notes_together, whole_share
from shardit.parallel.tensor.check.units import Checks
from shardit.parallel.tensor.plan import TensorPlan
from shardit.parallel.tensor.planner import plan_tensors
from shardit.parallel.tensor.whole import cuts_by_name

_log = logging.getLogger("shardit")

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
    cut_model(part, plan, ranks, title)
    checks: Checks = part.shardit_checks
    checks.for_training = True
    found = cuts_by_name(part, plan, ranks.index)
    return TensorSlices({f"{inner}.{name}" if inner else name: cut for name, cut in found.items()}, ranks)


def _plan(model: Any, size: int) -> TensorPlan:
    if type(model).__module__.partition(".")[0] in _LANGUAGE and hasattr(model, "get_output_embeddings"):
        plan = plan_decoder(model, size)
        assert plan is not None
        return plan
    with base_linears(model):
        return plan_tensors(model, size, FAMILY, must_cut=True)
