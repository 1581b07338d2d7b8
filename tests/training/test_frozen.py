"""Frozen beginnings: an adapter in late blocks, checkpointing and dropout, over stages that train nothing."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from shardit import training
from shardit.core.training.schedules import _Stage
from tests.language import families
from tests.support.ranks import run_ranks
from tests.training.models import accumulate, task, text_loss, worst
from tests.training.runs import join

CLOSE = 2e-6
LATE = "23"
KINDS = (
    *itertools.product((LATE,), (False, True), (0.0, 0.3)),
    ("0", True, 0.3),
    ("03", False, 0.3),
    ("1", True, 0.0),
)
"""The blocks with an adapter, checkpointing, and the probability of dropout in attention and before adapters."""


def seeded_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """A loss that seeds by its micro-batch, so that one rank draws the same in any order."""
    torch.manual_seed(int(batch.sum()))
    return text_loss(model, batch)


def adapted(places: str, checkpointing: bool, dropout: float) -> nn.Module:
    """A Llama in training mode, with an adapter in some of its 4 blocks."""
    from peft import LoraConfig, get_peft_model

    model: Any = families.make("llama", attention_dropout=dropout).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = rf".*layers\.[{places}]\..*[qv]_proj"
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(5)
    return get_peft_model(model, config).train()


class Work:
    """Counts the backwards of this rank, and the gradients that it sends."""

    def __init__(self) -> None:
        self.backwards = self.sent = 0
        own_backward, own_sends = torch.autograd.backward, _Stage.get_bwd_send_ops

        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self.backwards += isinstance(tensors, torch.Tensor) or len(tensors) > 0  # of none, it does nothing
            own_backward(tensors, *args, **kwargs)

        def sends(stage: Any, index: int) -> list[Any]:
            found = own_sends(stage, index)
            self.sent += len(found)
            return found

        torch.autograd.backward, _Stage.get_bwd_send_ops = backward, sends  # pyright: ignore


def frozen_beginning(rank: int, size: int, method: str, schedule: str) -> list[dict[str, Any]]:
    """For each kind: how gradients and norm of a step differ from one rank, and the work of this rank."""
    join(rank, size, method)
    found, work = [], Work()
    for kind in KINDS:
        plain, model = adapted(*kind), adapted(*kind)
        batches = [task("llama").batch(number, False) for number in range(4)]
        expected = accumulate(plain, seeded_loss, batches)
        staged = training.stages(
            model, seeded_loss, schedule=schedule, check_gradients=False, pipeline_parallel_size=size, timeout_s=30
        )
        work.backwards = work.sent = 0
        value = float(staged.step(batches))
        largest, compared, only = worst(staged.named_parameters(), plain)
        trained = [one for one in staged.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(staged.parameters())
        norm = float(staged.clip_grad_norm_(1.0)) / float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        optimizer.step()
        found.append(
            {
                "loss": value,
                "differences": [abs(value / expected - 1), abs(norm - 1), largest],
                "only": only,
                "trained": (len(trained), compared, sum(bool(one.grad.norm() > 0) for one in trained)),  # pyright: ignore
                "work": (work.backwards, work.sent),
                "states": len(optimizer.state),
            }
        )
    return found


@pytest.mark.parametrize(("size", "schedule"), [(2, "1f1b"), (4, "1f1b"), (2, "zbv")])
def test_frozen_beginnings(size: int, schedule: str) -> None:
    of_ranks = run_ranks(size, functools.partial(frozen_beginning, schedule=schedule), timeout=120)
    for rank, kinds in enumerate(of_ranks):
        assert len(kinds) == len(KINDS)
        for kind, found in zip(KINDS, kinds, strict=True):
            print(rank, kind, found)
            assert max(found["differences"]) < CLOSE, (rank, kind, found)
            assert not found["only"]
            assert len(set(found["trained"])) == 1, (rank, kind, found)  # all of them, and none is zero
            assert found["states"] == found["trained"][0]
            if schedule == "1f1b" and kind[0] == LATE and rank < size // 2:
                assert found["trained"][0] == 0
                assert found["work"] == (0, 0)  # nothing to train: no backward, and nothing is sent
            if schedule == "1f1b" and kind[0] == LATE and rank == size // 2:
                assert found["work"] == (4, 0)
    for number, (places, _, _) in enumerate(KINDS):
        assert sum(kinds[number]["trained"][0] for kinds in of_ranks) == len(places) * 2 * 2
    losses = [found["loss"] for found in of_ranks[0]]
    assert losses[:2] == losses[2:4]  # checkpointing changes nothing
    assert losses[0] != losses[1]  # dropout does
