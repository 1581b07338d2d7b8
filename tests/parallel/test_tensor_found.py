"""Tensor parallelism of modules that no rule names: what a trial finds in their forward, and the share that stays
whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from shardit.core.comm.collectives import Collectives
from shardit.core.placement.slices import Shards
from shardit.diffusion.family import FAMILY
from shardit.parallel.tensor import planner
from shardit.parallel.tensor.apply import cut_model, plan_components, shard_tensors
from shardit.parallel.tensor.plan import TensorPlan
from shardit.parallel.tensor.planner import plan_tensors
from tests.parallel.test_tensor import CLOSE, SINGLE, distance, tensor_mesh
from tests.support import survey_models
from tests.support.ranks import run_ranks
from tests.support.survey_models import Draw, Entry, randomise
from tests.support.whole_share import MODELS, measure

# Modules of one or two linears, and what a trial finds in them.


class Gated(nn.Module):
    """Gates and channels from one linear; `way`: how they lie in it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.inward, self.outward = nn.Linear(16, 80), nn.Linear(40, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inward(x)
        if self.way == "in turn":
            gate, up = hidden.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            gate, up = hidden.chunk(2, -1)
        if self.way == "normed":
            up = up / up.norm(dim=-1, keepdim=True)
        if self.way == "width":
            up = up.reshape(*x.shape[:-1], 40)
        out = self.outward(F.silu(gate) * up)
        return out + gate.sum(-1, keepdim=True) if self.way == "returned" else out


class Fused(nn.Module):
    """Attention with queries, keys and values from one linear, and a feed-forward beside it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.heads, self.head_dim, self.inner_dim = way, 4, 8, 32
        self.both, self.out = nn.Linear(16, 96 + 2 * 48), nn.Linear(32 + 48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.both(x)
        attended = 3 * self.heads * self.head_dim
        heads, hidden = both.split([attended, both.shape[-1] - attended], -1)
        if self.way == "by head":
            query, key, value = heads.unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        else:
            query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in heads.chunk(3, -1))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        scores = (query @ key.transpose(-1, -2)).softmax(-1)
        if self.way == "mixing":
            scores = scores - 0.5 * scores.mean(1, keepdim=True)
        gate, up = hidden.chunk(2, -1)
        return self.out(torch.cat([(scores @ value).transpose(1, 2).flatten(2), gate.sigmoid() * up], -1))


class Convolved(nn.Module):
    """A feed-forward of convolutions: of all channels at one place, and of each channel apart."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(8, 64, 1), nn.Conv2d(32, 8, 1)
        self.apart = nn.Conv2d(64, 64, 3, padding=1, groups=64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, gate = self.apart(F.silu(self.inward(x))).chunk(2, 1)
        return x + self.outward(hidden * F.silu(gate))


class InBlock(nn.Module):
    """A block with a feed-forward of its own behind one that is a module."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.norm = Gated("halves"), nn.LayerNorm(16)
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor, temb: torch.Tensor, rotary_emb: Any) -> torch.Tensor:
        x = x + self.first(x) * temb
        return x + self.outward(F.gelu(self.inward(self.norm(x))))


class ReadByCode(nn.Module):
    """Takes the weight of one linear itself, and only the dtype of that of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Gated("halves")
        self.read, self.asked = nn.Linear(256, 512), nn.ModuleList([nn.Linear(512, 512)])

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(more.to(self.asked[0].weight.dtype), self.read.weight, self.read.bias)
        return self.block(x) + self.asked[0](hidden).sum()


KINDS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "halves": (Gated, "halves", ("",)),
    "in turn": (Gated, "in turn", ("",)),
    "fused": (Fused, "by part", ("",)),
    "fused by head": (Fused, "by head", ("",)),
    "convolved": (Convolved, "", ("",)),
    "in a block": (InBlock, "", ("first", "")),
    # What a rank cannot do on slices.
    "a norm of all channels": (Gated, "normed", ()),
    "all channels counted": (Gated, "width", ()),
    "channels returned": (Gated, "returned", ()),
    "heads mixed": (Fused, "mixing", ()),
}
"""What is made, and the units that are found."""


def arguments(model: nn.Module) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 8, 5, 5) if isinstance(model, Convolved) else (2, 5, 16)
    x = torch.randn(shape, generator=generator)
    if isinstance(model, ReadByCode):
        return x, torch.randn(3, 256, generator=generator)
    return (x, torch.randn(2, 1, 16, generator=generator), x) if isinstance(model, InBlock) else (x,)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", KINDS)
def test_a_trial_finds_what_runs_on_slices(name: str, size: int) -> None:
    make, way, units = KINDS[name]
    plan = plan_tensors(make(way), size, FAMILY)
    assert tuple(sorted(plan.units, reverse=True)) == units
    assert bool(plan.cuts) == bool(units)
    for cut in plan.cuts.values():
        assert sorted(i for run in cut.ranks for start, length in run for i in range(start, start + length)) == list(
            range(cut.total)
        )


def test_segments_are_those_of_the_code() -> None:
    halves, in_turn = (plan_tensors(Gated(way), 2, FAMILY).cuts["inward.weight"] for way in ("halves", "in turn"))
    assert halves.ranks == (((0, 20), (40, 20)), ((20, 20), (60, 20)))
    assert in_turn.ranks == (((0, 40),), ((40, 40),))
    fused = plan_tensors(Fused("by part"), 2, FAMILY)
    assert fused.cuts["both.weight"].ranks[1] == ((16, 16), (48, 16), (80, 16), (120, 24), (168, 24))
    assert fused.attributes[""]["heads"] == (2, 2)


def test_a_plan_needs_no_weights() -> None:
    """The same plan on meta, in another dtype and with another default, and no random numbers drawn."""
    expected = plan_tensors(Fused("by part"), 2, FAMILY)
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model = Fused("by part").bfloat16()
        assert plan_tensors(model, 2, FAMILY) == expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert plan_tensors(Fused("by part"), 2, FAMILY) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    plan_tensors(model, 2, FAMILY)
    torch.random.set_rng_state(state)
    with torch.device("meta"):
        plan_tensors(model, 2, FAMILY)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_weight_that_code_reads_itself_is_not_gathered() -> None:
    plan = plan_tensors(ReadByCode(), 2, FAMILY)
    assert plan.roles["asked.0"].kind == "gathered"
    assert "read.weight" not in plan.cuts
    assert "block.inward.weight" in plan.cuts


def small_models(rank: int, count: int, method: str) -> dict[str, tuple[float, bool]]:
    ranks = Collectives(tensor_mesh(rank, count, method).axes["tp"])
    found = {}
    made = {name: make(way) for name, (make, way, units) in KINDS.items() if units} | {"gathered": ReadByCode()}
    for name, model in made.items():
        randomise(model).eval()
        plan = plan_tensors(model, count, FAMILY)
        with torch.no_grad():
            expected = model(*arguments(model))
            cut_model(model, plan, ranks, name)
            found[name] = (distance(expected, model(*arguments(model))), bool(model.shardit_checks.whole))
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_modules_that_no_rule_names_give_the_same(count: int) -> None:
    for found in run_ranks(count, small_models, timeout=120):
        assert found
        assert all(apart <= CLOSE and not whole for apart, whole in found.values()), found


# Models of diffusers.

_WIDE = {"num_attention_heads": 4, "attention_head_dim": 16}
_LTX2 = {"cross_attention_dim": 64, "audio_num_attention_heads": 4, "audio_cross_attention_dim": 32}
_SANA = {"num_cross_attention_heads": 4, "cross_attention_dim": 64}
_KREA = {"num_key_value_heads": 2, "text_num_attention_heads": 4, "text_num_key_value_heads": 2}
_PRX = "diffusers.models.transformers.transformer_prx:PRXTransformer2DModel"

FOUND: dict[str, dict[str, Any]] = {
    "Flux2Transformer2DModel": _WIDE,
    "LTX2VideoTransformer3DModel": {**_WIDE, **_LTX2},
    "Lumina2Transformer2DModel": {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 2},
    _PRX: {"hidden_size": 64, "num_heads": 4},
    "ErnieImageTransformer2DModel": {"hidden_size": 64, "num_attention_heads": 4},
    "SanaTransformer2DModel": {**_WIDE, **_SANA},
    "AuraFlowTransformer2DModel": {**_WIDE, "caption_projection_dim": 64},
    "MochiTransformer3DModel": _WIDE,
    "HiDreamImageTransformer2DModel": _WIDE,
    "CosmosTransformer3DModel": _WIDE,
    "Kandinsky5Transformer3DModel": {"model_dim": 64},
    "Krea2Transformer2DModel": {**_WIDE, **_KREA},
    "OmniGenTransformer2DModel": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "StableAudio3DiTModel": {},
    "MiniMaxMusic3Transformer1DModel": _WIDE,
    "MiniMaxMusic3RVQDepthDecoder": {"num_attention_heads": 4},
    "SD3Transformer2DModel": {**_WIDE, "caption_projection_dim": 64},
}
"""What gives the tiny configurations of the survey four heads."""


def entry_of(name: str, count: int) -> Entry:
    """The tiny configuration of a class with a head for each rank."""
    entry = survey_models.entry(name)
    return replace(entry, config={**entry.config, **FOUND[name]}) if count > 2 else entry


def models(rank: int, count: int, method: str, names: list[str]) -> dict[str, tuple[float, list[str]]]:
    mesh = tensor_mesh(rank, count, method)
    found = {}
    for name in names:
        entry = entry_of(name, count)
        model, extra = entry.build(), {"return_dict": False} if entry.returns else {}
        plan = plan_components({"": model}, SINGLE, count, FAMILY)[""]
        with torch.no_grad():
            expected = model(**entry.inputs(Draw(0, False)), **extra)
            cut_model(model, plan, Collectives(mesh.axes["tp"]), name)
            got = model(**entry.inputs(Draw(0, False)), **extra)
        pairs = zip(tree_leaves(expected), tree_leaves(got), strict=True)
        apart = max(distance(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point())
        found[name] = (apart, [*plan.notes, *model.shardit_checks.whole.values()])
    return found


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("part", range(4))
def test_models_give_the_same(part: int, count: int) -> None:
    """Close to one rank, and no unit has to become whole."""
    names = [*FOUND][part::4]
    for found in run_ranks(count, models, names, timeout=250):
        assert [*found] == names
        for name, (apart, whole) in found.items():
            assert apart <= CLOSE, (name, apart)
            assert not whole, (name, whole)


def wrong_plan(wrong: str) -> tuple[Entry, TensorPlan, nn.Module]:
    """A tiny model, and a plan for two ranks with a fault in it."""
    entry = survey_models.entry("MochiTransformer3DModel" if wrong == "tables" else "Flux2Transformer2DModel")
    model = entry.build()
    plan = plan_tensors(model, 2, FAMILY)
    for name, role in [*plan.roles.items()]:
        if wrong == "tables" and role.kind == "heads":
            plan.roles[name] = replace(role, tables=())
    for name, cut in [*plan.cuts.items()]:
        if wrong == "halves" and "ff.linear_in" in name:  # gates of one rank, channels of the other
            (gate, other_up), (other_gate, up) = cut.ranks
            plan.cuts[name] = Shards(0, cut.total, ((gate, up), (other_gate, other_up)))
        if wrong == "segments" and "to_qkv_mlp_proj" in name:
            plan.cuts[name] = Shards(0, cut.total, tuple((run[1], run[0], *run[2:]) for run in cut.ranks))
    return entry, plan, model


def with_fault(rank: int, count: int, method: str, wrong: str) -> tuple[float, float, list[str]]:
    """Distances without the comparison at the first call and with it, and what became whole."""
    ranks = Collectives(tensor_mesh(rank, count, method).axes["tp"])
    apart, whole = [], []
    for checked in (False, True):
        entry, plan, model = wrong_plan(wrong)
        with torch.no_grad():
            (expected,) = model(**entry.inputs(Draw(0, False)), return_dict=False)
            if checked:
                cut_model(model, plan, ranks, wrong)
            else:
                shard_tensors(model, plan, ranks)
            try:
                apart.append(distance(expected, model(**entry.inputs(Draw(0, False)), return_dict=False)[0]))
            except RuntimeError:  # shapes that do not fit
                apart.append(float("inf"))
        whole = [*model.shardit_checks.whole] if checked else []
    return apart[0], apart[1], whole


@pytest.mark.parametrize("wrong", ["tables", "halves", "segments"])
def test_a_wrong_cut_is_noticed(wrong: str) -> None:
    for unchecked, checked, whole in run_ranks(2, with_fault, wrong, timeout=120):
        assert unchecked > 100 * CLOSE
        assert checked <= CLOSE
        assert whole


# The share that stays whole with the default configurations.


@pytest.mark.parametrize("name", MODELS)
def test_hardly_anything_stays_whole(name: str) -> None:
    whole = measure(name)
    assert max(whole.shares.values()) <= 0.01, (whole.shares, whole.names)


def test_without_trials_much_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "cut_rest", lambda cutter: None)
    assert measure("Flux2Transformer2DModel").shares[2] > 0.5
    assert measure("AuraFlowTransformer2DModel").shares[2] > 0.2
