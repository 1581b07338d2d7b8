"""Encoders that pipelines of diffusers name, over two tensor ranks: all hidden states, against whole ones."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from shardit.diffusion.family import FAMILY
from shardit.diffusion.roles import roles_of
from shardit.errors import UnsupportedError
from shardit.parallel.tensor.apply import TensorPlan, plan_components, shard_components
from tests.parallel.test_tensor import tensor_mesh
from tests.support.encoder_models import ENCODERS
from tests.support.ranks import run_ranks

CLOSE = 1e-5
KEPT_WHOLE = {"GPT2LMHeadModel"}
"""Encoders whose attention has names without a rule: they are on one rank."""


def planned(model: nn.Module, count: int) -> dict[str, TensorPlan]:
    modules = {"text_encoder": model}
    return plan_components(modules, roles_of(modules), count, FAMILY)


def encode(rank: int, count: int, method: str) -> dict[str, tuple[float, int, dict[str, str]]]:
    logging.getLogger("shardit").setLevel(logging.ERROR)
    mesh = tensor_mesh(rank, count, method)
    found = {}
    for encoder in ENCODERS:
        plain, model = encoder.build(), encoder.build()
        plans = planned(model, count)
        if not plans:  # it stays on one rank
            found[encoder.name] = (0.0, 0, {})
            continue
        shard_components({"text_encoder": model}, plans, mesh)
        checks: Any = model.shardit_checks
        errors = []
        with torch.no_grad():
            for _ in range(2):
                expected, got = (encoder.call(m, copy.copy(encoder.inputs)) for m in (plain, model))
                pairs = zip(tree_leaves(expected), tree_leaves(got), strict=True)
                tensors = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
                errors += [float((a - b).norm() / a.norm()) for a, b in tensors if a.shape == b.shape]
        found[encoder.name] = (max(errors), checks.compared, checks.whole)
    attentions(mesh)
    renormalised(mesh)
    return found


def attentions(mesh: Any) -> None:
    """Requested attention maps include all heads; requesting them costs nothing if a back end has none."""
    encoder = next(e for e in ENCODERS if e.name == "Qwen3ForCausalLM")
    for back_end in ("sdpa", "eager"):
        plain: Any = encoder.build()
        model: Any = encoder.build()
        for m in (plain, model):
            m.set_attn_implementation(back_end)
        shard_components(
            {"text_encoder": model},
            planned(model, 2),
            mesh,
        )
        with torch.no_grad():
            expected, got = (m(**encoder.inputs, output_attentions=True) for m in (plain, model))
        assert bool(model.shardit_checks.whole) == (back_end == "eager")
        for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.allclose(a, b, atol=1e-4), back_end


def renormalised(mesh: Any) -> None:
    """Tables that change the rows which are looked up: words, and distances between tokens of T5."""
    for name in ("CLIPTextModel", "T5EncoderModel"):
        encoder = next(e for e in ENCODERS if e.name == name)
        plain, model = encoder.build(), encoder.build()
        tables = [m for whole in (plain, model) for m in whole.modules() if isinstance(m, torch.nn.Embedding)]
        for table in tables:
            table.max_norm = 0.5
        plans = planned(model, 2)
        shard_components({"text_encoder": model}, plans, mesh)
        assert all("max_norm" in note for note in plans["text_encoder"].notes)
        assert not any(
            isinstance(m, torch.nn.Embedding) and f"{n}.weight" in plans["text_encoder"].cuts
            for n, m in model.named_modules()
        )
        with torch.no_grad():
            for _ in range(2):
                expected, got = (encoder.call(m, copy.copy(encoder.inputs)).last_hidden_state for m in (plain, model))
                assert float((expected - got).norm() / expected.norm()) <= CLOSE, name
    encoder = ENCODERS[0]
    model = encoder.build()
    shard_components({"text_encoder": model}, planned(model, 2), mesh)
    model.get_submodule("embeddings.token_embedding").max_norm = 0.5  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedError, match="max_norm"):
        encoder.call(model, copy.copy(encoder.inputs))


def test_every_hidden_state_is_the_same() -> None:
    for found in run_ranks(2, encode):
        assert len(found) == len(ENCODERS)
        for name, (error, compared, whole) in found.items():
            assert error <= CLOSE, (name, error)
            assert not whole, (name, whole)
            assert (compared > 0) == (name not in KEPT_WHOLE), name
