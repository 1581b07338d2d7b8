"""Awkward data flow around blocks is carried right or refused on all ranks; broken communication is noticed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map

from shardit.core.comm.p2p import Comm
from shardit.core.comm.wire import pack_layout
from shardit.core.plans import traced_call
from shardit.core.plans.call_plan import CallPlan
from shardit.core.stages.transformer_stages import Runtime
from shardit.errors import RankError, UnsupportedError
from tests.support.awkward_models import MODELS, WIDTH
from tests.support.ranks import run_ranks
from tests.support.survey_models import randomise
from tests.support.survey_runs import runtime_of, same, staged

RANKS = 3
CHUNKS = (1, 2)


def _inputs(seed: int, length: int, with_list: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(2, length, WIDTH, generator=generator), torch.rand(2, generator=generator)
    return (x, t, [x * i for i in range(6)]) if with_list else (x, t)


def _try(name: str, runtime: Runtime, chunks: int, after_first: Callable[[], Any] = lambda: None) -> str:
    """Return the outcome of a model: "right", "wrong", "refused: ..." or the error's type."""
    torch.manual_seed(0)  # biases keep a part of what they are made with
    model = randomise(MODELS[name]()).eval()
    lists = "more" in inspect.signature(model.forward).parameters
    calls = [_inputs(*call, lists) for call in ((0, 5), (1, 5), (2, 5), (3, 7), (4, 7))]
    with torch.no_grad():
        plain = [model(*tree_map(torch.clone, call)) for call in calls]
    stages = staged(model, runtime, chunks)
    try:
        got = [model(*calls[0])]
        after_first()
        got += [model(*call) for call in calls[1:3]]
        equal = [same(a, b) for a, b in zip(plain, got, strict=False)]
        got += [model(*call) for call in calls[3:]]
        equal += [same(a, b) for a, b in zip(plain[3:], got[3:], strict=True)]
    except UnsupportedError as error:
        return f"refused: {error}"
    except RankError:
        raise
    except Exception as error:
        return type(error).__name__
    strangers = any(stages.cut.owners[i] != runtime.comm.rank for i in stages.cut.ran)
    return "right" if all(equal) and not strangers else f"wrong {equal} {strangers}"


def _all_awkward(rank: int, size: int, method: str) -> dict[tuple[str, int], str]:
    runtime = runtime_of(rank, size, method)
    found = {(name, chunks): _try(name, runtime, chunks) for name in MODELS for chunks in CHUNKS}
    runtime.comm.flush()
    runtime.comm.group.barrier()
    return found


@pytest.fixture(scope="module")
def awkward() -> list[dict[tuple[str, int], str]]:
    """Return the outcomes of all models on every rank."""
    return run_ranks(RANKS, _all_awkward)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", list(MODELS))
def test_right_or_refused_on_every_rank(awkward: list[dict[tuple[str, int], str]], name: str, chunks: int) -> None:
    verdicts = [found[name, chunks] for found in awkward]
    cls = MODELS[name]
    for verdict in verdicts:
        if cls.refused is not None:
            assert verdict.startswith("refused: "), verdicts
            assert cls.refused in verdict, verdicts
        elif cls.error is not None:
            assert verdict == cls.error.__name__, verdicts
        else:
            assert verdict == "right", verdicts


# Negative controls: what is broken on purpose must be seen.


@contextmanager
def _sends(change: Callable[[torch.Tensor], torch.Tensor], on: list[bool]) -> Iterator[None]:
    """While `on[0]`, every message between stages is changed before it is sent."""
    real = Comm.send

    def send(self: Comm, message: torch.Tensor, target: int, *, result: bool = False) -> Any:
        return real(self, change(message) if on[0] and not result else message, target, result=result)

    with mock.patch.object(Comm, "send", send):
        yield


def _one_byte(message: torch.Tensor) -> torch.Tensor:
    changed = message.clone()
    changed[1] ^= 1  # the last bit of a float may vanish in the next sum
    return changed


def _without_an_item(plan: CallPlan) -> CallPlan:
    """The plan without the last thing that its last hop carries."""
    hop = plan.hops[-1]
    items = hop.items[:-1]
    hop = dataclasses.replace(hop, items=items, layout=pack_layout(tuple(item.size for item in items)))
    return dataclasses.replace(plan, hops=(*plan.hops[:-1], hop))


def _all_broken(rank: int, size: int, method: str) -> dict[str, str]:
    runtime = runtime_of(rank, size, method)
    found = {}
    for label, change in {"zeros": torch.zeros_like, "one byte": _one_byte}.items():
        with _sends(change, [True]):
            found[f"{label} from the start"] = _try("Plain", runtime, 2)
        on = [False]
        with _sends(change, on):
            found[f"{label} later"] = _try("Plain", runtime, 2, lambda on=on: on.__setitem__(0, True))
    real = traced_call.derive
    for name in ("Plain", "Skips", "EarlyTensor"):
        with mock.patch.object(traced_call, "derive", lambda *args: _without_an_item(real(*args))):
            found[f"dropped item in {name}"] = _try(name, runtime, 1)
    found["not broken"] = _try("Plain", runtime, 2)
    runtime.comm.flush()
    runtime.comm.group.barrier()
    return found


def test_broken_communication_is_noticed() -> None:
    for found in run_ranks(RANKS, _all_broken):
        assert found.pop("not broken") == "right"
        for label, verdict in found.items():
            expected = "wrong [True, False, False" if label.endswith("later") else "refused: Plain cannot be cut"
            if "dropped" in label:
                expected = "refused: "
            assert verdict.startswith(expected), (label, verdict)
