"""A program changes state between calls of a model over stages; each call reads what it would read on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shardit
from shardit.errors import UnsupportedError
from tests.support.ranks import run_ranks

STEPS = 3


class Net(nn.Module):
    """Four blocks; floats and flags decide what it does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(8, 8)

    def forward(
        self, x: torch.Tensor, sigma: float = 1.0, skipped: Any = (), shared: bool = False
    ) -> tuple[torch.Tensor, float]:
        given, x = x, self.inner(x)
        for number, block in enumerate(self.blocks):
            if number not in skipped and not (number == 2 and sigma < 0.5):
                x = block(x).tanh()
        x = x + x.mean(0, keepdim=True) if shared else x
        return self.last(x + given) * sigma, sigma**2


def branches(model: nn.Module, change: Callable[[float], Any]) -> list[Any]:
    """Two calls in each step, with other state for the second."""
    outs = []
    with torch.no_grad():
        for step in range(STEPS):
            x = torch.full((1, 8), 0.1 + step)
            change(1.0)
            first, _ = model(x)
            change(2.0)
            second, _ = model(-x)
            outs.append(second + 3 * (first - second))
    return outs


def hooked(model: Any) -> list[Any]:
    state = {"scale": 1.0}
    model.last.register_forward_hook(lambda module, args, out: out * state["scale"])
    return branches(model, lambda scale: state.update(scale=scale))


def adapted(model: Any) -> list[Any]:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    if not layers:
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["blocks.3", "last"])
        inject_adapter_in_model(config, model)
        layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
    return branches(model, lambda scale: [layer.set_scale("default", scale) for layer in layers])


def written(model: Any) -> list[Any]:
    """One buffer for the arguments of both calls, whose writes torch does not count."""
    outs = []
    with torch.inference_mode():
        buffer = torch.zeros(1, 8)
        for step in range(STEPS):
            buffer.fill_(0.1 + step)
            first, _ = model(buffer)
            buffer.fill_(-0.1 - step)
            second, _ = model(buffer)
            outs.append(second + 3 * (first - second))
    return [out.clone() for out in outs]


def kept(model: Any) -> list[Any]:
    """A hook that keeps copies of arguments, as scripts that log do; a tensor of one element may have a stride of 0."""
    calls: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, args: calls.extend(arg.clone() for arg in args))
    with torch.no_grad():
        return [model(torch.tensor(step + 0.5).expand(1, 8), torch.tensor(0.9 - step).expand(1)) for step in range(2)]


def inferred(model: Any) -> list[Any]:
    """Results of calls in inference mode, first used outside of it."""

    @torch.inference_mode()
    def predict(value: float) -> torch.Tensor:
        return model(torch.full((1, 8), value))[0]

    pairs = [(predict(0.1 + step), predict(-0.1 - step)) for step in range(STEPS)]
    return [second + 3 * (first - second) for first, second in pairs]


def numbers(model: Any) -> list[Any]:
    with torch.no_grad():
        return [model(torch.ones(1, 8), sigma) for sigma in (1.0, 0.9, 0.3, 1.0, 0.9)]


def flags(model: Any) -> list[Any]:
    with torch.no_grad():
        return [model(torch.ones(1, 8), 1.0, [skipped]) for skipped in (*np.arange(3), 1, np.int64(0))]


def related(model: Any) -> list[Any]:
    """Two samples, which are unrelated in the first call, so that it runs in two parts."""
    x = torch.arange(16).reshape(2, 8) / 16
    with torch.no_grad():
        return [model(x, shared=shared)[0] for shared in (False, True, False)]


PROGRAMS = {
    program.__name__: program for program in (hooked, adapted, written, kept, inferred, numbers, flags, related)
}


def _on_ranks(rank: int, count: int, method: str, name: str) -> Any:
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    model = Net().eval()
    if name == "adapted":
        adapted(model)  # adapters come before the model is cut
    shardit.parallelize(model, pipeline_parallel_size=2, timeout_s=20)
    return PROGRAMS[name](model)


@pytest.mark.parametrize("name", PROGRAMS)
def test_state_between_calls(name: str) -> None:
    model = Net().eval()
    if name == "adapted":
        adapted(model)
    expected = PROGRAMS[name](model)
    for found in run_ranks(2, _on_ranks, name):
        for want, got in zip(expected, found, strict=True):
            pairs = zip(want, got, strict=True) if isinstance(want, tuple) else [(want, got)]
            tolerance = 1e-6 if name == "related" else 0.0  # products of one sample round differently
            for a, b in pairs:
                torch.testing.assert_close(torch.as_tensor(b), torch.as_tensor(a), rtol=tolerance, atol=tolerance)


def _weights(rank: int, count: int, method: str) -> str:
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=count)
    model: Any = Net().eval()
    shardit.parallelize(model, pipeline_parallel_size=2, timeout_s=20)
    weight = model.last.weight
    plain = weight.detach().clone()
    try:
        branches(model, lambda scale: _write(weight, plain * scale))
    except UnsupportedError as error:
        return str(error)
    return ""


def _write(weight: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def test_weights_that_change_under_a_call_in_flight_are_refused() -> None:
    for found in run_ranks(2, _weights):
        assert "changed in place while a call of it is in flight: use the result of the call before" in found
