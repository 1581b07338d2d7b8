"""Calls of one model in flight together over slices or sharded tokens: the same bits as one after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardit
from shardit import DiffusionParallelConfig, Plan, RankError, UnsupportedError
from shardit.core.comm.collectives import Collectives
from shardit.core.comm.group import GroupCoordinator
from shardit.core.runtime.pending import PendingTensor, materialize
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.parallel.test_tensor import distance
from tests.support import brought
from tests.support.ranks import run_ranks

WAYS = {"ulysses": {"ulysses_degree": 2}, "ring": {"ring_degree": 2}, "slices": {"tensor_parallel_size": 2}}


def open_model(rank: int, count: int, method: str, way: str) -> tuple[Any, list[dict[str, Any]]]:
    """Tiny Wan (its norms run across heads), and the arguments of three calls, the last of another length."""
    join(rank, count, method)
    model = brought.pipeline("wan2.2-t2v").transformer
    torch.manual_seed(0)
    calls = [
        {
            "hidden_states": torch.randn(1, model.config.in_channels, 3, 4, width),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 5, model.config.text_dim),
            "return_dict": False,
        }
        for width in (8, 8, 12)
    ]
    shardit.parallelize(model, DiffusionParallelConfig(**WAYS[way]), plan=Plan(overlap=True), timeout_s=60)
    with torch.no_grad():
        for call in calls:  # the first of each signature
            materialize(model(**call))
    return model, calls


def alone(model: Any, calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        outs = []
        for call in calls:
            (out,) = model(**call)
            materialize(out)
            outs.append(out)
    return outs


def together(model: Any, calls: list[dict[str, Any]]) -> list[torch.Tensor]:
    with torch.no_grad():
        outs = [model(**call)[0] for call in calls]
        assert all(type(out) is PendingTensor for out in outs)
        materialize(outs)
    return outs


def in_flight(rank: int, count: int, method: str, way: str) -> None:
    model, calls = open_model(rank, count, method, way)
    expected = alone(model, calls)
    before = model.shardit_overlap.overlapped
    got = together(model, calls)
    schedule = model.shardit_overlap.runtime.schedule
    assert schedule.most_in_flight == 3
    assert not schedule.active
    assert model.shardit_overlap.overlapped == before + 3
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_same_bits(way: str) -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, in_flight, way)


class OwnOperation:
    """A processor of a user, for Qwen-Image: its attention is an operation that is defined in Python."""

    def __init__(self) -> None:
        self.library = torch.library.Library("shardit_tests", "FRAGMENT")
        self.library.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
        self.library.impl("attention", self.attention, "CompositeExplicitAutograd")

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v).contiguous()

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *others: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q, k, v = (
            torch.cat([one(encoder_hidden_states), other(hidden_states)], 1).unflatten(-1, (attn.heads, -1))
            for one, other in zip(text, (attn.to_q, attn.to_k, attn.to_v), strict=True)
        )
        out = torch.ops.shardit_tests.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
        cut = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, cut:]), attn.to_add_out(out[:, :cut])


def own_operation(rank: int, count: int, method: str, way: str) -> None:
    join(rank, count, method)
    pipe, processor = brought.pipeline("qwen-image"), OwnOperation()
    for module in pipe.transformer.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)
    guided = {"negative_prompt": "blurry", "true_cfg_scale": 2.0}
    expected = brought.run(pipe, "qwen-image", **guided)
    config: Any = WAYS[way]
    shardit.parallelize(pipe, timeout_s=60, **config)
    for _ in range(2):
        assert distance(expected, brought.run(pipe, "qwen-image", **guided)) <= 1e-5
    assert pipe.transformer.shardit_overlap.overlapped > 0


@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_messages_inside_an_operation(way: str) -> None:
    """Operations of torch end in the reverse order of their beginning, also of two calls in flight."""
    tiny.resolve("tiny/qwen-image")
    run_ranks(2, own_operation, way)


def messages_first(rank: int, count: int, method: str) -> None:
    """A call starts to send before the previous one has waited: this overlap hides the messages."""
    model, calls = open_model(rank, count, method, "ulysses")
    said: list[str] = []
    exchange, wait = Collectives._exchange, GroupCoordinator.wait

    def exchanged(self: Any, sends: Any, receives: Any) -> None:
        said.append("exchange")
        exchange(self, sends, receives)

    def waited(self: Any, works: Any, what: str, alive: Any = None) -> None:
        if self.axis:
            said.append("wait")
        wait(self, works, what, alive)

    Collectives._exchange, GroupCoordinator.wait = exchanged, waited  # type: ignore[method-assign]
    together(model, calls[:2])
    assert said[:2] == ["exchange", "exchange"]
    said.clear()
    alone(model, calls[:2])
    assert said == ["exchange", "wait"] * (len(said) // 2)


def test_messages_travel_while_others_compute() -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, messages_first)


def own_errors(rank: int, count: int, method: str) -> None:
    """An argument that changes while its call is in flight ends everything, as with stages."""
    model, calls = open_model(rank, count, method, "slices")
    with torch.no_grad():
        outs = [model(**call)[0] for call in calls[:2]]
        calls[1]["hidden_states"].zero_()
        with pytest.raises(RankError, match="changed in place"):
            outs[0].sum()


class Agent(nn.Module):
    """Its forward stores state on the module, which a block reads; its result depends on the call."""

    def __init__(self, keeps: bool, varies: bool):
        super().__init__()
        self.blocks = nn.ModuleList(KeeperBlock() for _ in range(2))
        self.keeps, self.varies, self.shift = keeps, varies, None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        if self.keeps:
            self.blocks[0].shift = self.blocks[1].shift = x.mean() * torch.ones(16)
        out = x
        for block in self.blocks:
            out = block(out)
        return out, int(x[0, 0, 0] > 0) if self.varies else 1


class KeeperBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        self.attn = Attention(16, heads=4, dim_head=4)
        self.ff = FeedForward(16, mult=2)
        self.shift = torch.zeros(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        return x + self.ff(x) + self.shift


def agent(rank: int, count: int, method: str) -> None:
    """Models whose calls cannot be in flight together run one after the other, or raise an error with the remedy."""
    join(rank, count, method)

    def made(keeps: bool, varies: bool, plan: Plan | None = None) -> tuple[Any, Any]:
        torch.manual_seed(3)
        plain = Agent(keeps, varies)
        other = copy.deepcopy(plain)
        config = DiffusionParallelConfig(tensor_parallel_size=2)
        return plain, shardit.parallelize(other, config, plan=plan, timeout_s=30)

    torch.manual_seed(rank - rank)
    xs = [torch.randn(1, 6, 16) for _ in range(3)]
    xs[1][0, 0, 0], xs[2][0, 0, 0] = 1.0, -1.0
    with torch.no_grad():
        plain, other = made(True, False, Plan(overlap=True))
        for _ in range(2):
            outs = [other(x)[0] for x in xs]
            assert other.shardit_overlap.overlapped == 0
            assert all((plain(x)[0] - out).norm() <= 1e-5 * out.norm() for x, out in zip(xs, outs, strict=True))
        plain, other = made(False, True)
        outs = [other(x) for x in xs]  # by itself it is not overlapped, so that one rank alone may use what it gives
        assert type(outs[-1][0]) is torch.Tensor
        assert other.shardit_overlap.overlapped == 0
        plain, other = made(False, True, Plan(overlap=True))
        outs = [other(x)[0] for x in xs[1:]]
        with pytest.raises(UnsupportedError, match=r"Agent returns other shapes or values .* Plan\(overlap=False\)"):
            outs[1].sum()
        plain, other = made(False, True, Plan(overlap=False))
        assert [other(x)[1] for x in xs[1:]] == [1, 0]


def test_models_that_do_not_overlap() -> None:
    run_ranks(2, agent)


def test_an_argument_changed_in_place() -> None:
    tiny.resolve("tiny/wan2.2-t2v")
    run_ranks(2, own_errors)
