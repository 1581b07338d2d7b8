"""Coroutines own their torch state: none of it reaches another one, in any order of pauses."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardit.core.runtime.coroutine import Coroutine
from shardit.core.runtime.thread_state import Generators, TorchState
from shardit.core.runtime.yielding import yield_while_waiting, yielding_coroutine


class CountFunctions(TorchFunctionMode):
    """Counts the torch functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


class CountOperations(TorchDispatchMode):
    """Counts the operations that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "no inference": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast half": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "function mode": CountFunctions,
    "dispatch mode": CountOperations,
    "device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "nothing": contextlib.nullcontext,
}


def observe() -> tuple[Any, ...]:
    """Record the modes that the running code can see."""
    state = TorchState.capture()
    made = torch.ones(2, 2, requires_grad=True)
    product = made @ made
    return (
        state.grad,
        state.inference,
        state.autocast,
        state.autocast_cache,
        [type(mode).__name__ for mode in state.function_modes],
        [type(mode).__name__ for mode in state.dispatch_modes],
        torch.get_default_device(),
        made.device,
        product.dtype,
        product.requires_grad,
        product.is_inference(),
    )


def program(make: Callable[[], Any], log: list[Any], switch: Callable[[], None]) -> None:
    """Enter a mode, look around, pause three times, leave the mode; all looks must agree."""
    log.append(("outside", observe()))
    switch()
    with make():
        for _ in range(3):
            log.append(("inside", observe()))
            switch()
        log.append(("inside", observe()))
    switch()
    log.append(("outside", observe()))


def looks(log: list[Any], where: str) -> list[Any]:
    return [look for place, look in log if place == where]


@pytest.mark.parametrize("outer", ["nothing", "no_grad", "inference", "autocast"])
@pytest.mark.parametrize("first", MODES)
def test_modes_of_interleaved_coroutines(first: str, outer: str) -> None:
    for second in MODES if outer == "nothing" else [outer, "inference", "nothing"]:
        interleave(first, second, outer)


def interleave(first: str, second: str, outer: str) -> None:
    with MODES[outer]():
        before = observe()
        logs: list[list[Any]] = [[], []]
        coroutines = [
            Coroutine(lambda n=n, name=name: program(MODES[name], logs[n], lambda: coroutines[n].pause()))
            for n, name in enumerate((first, second))
        ]
        # The second is one step behind, so that modes overlap without nesting.
        coroutines[0].resume()
        while not all(c.done for c in coroutines):
            for coroutine in coroutines:
                if not coroutine.done:
                    coroutine.resume()
                    assert observe() == before
        for n, name in enumerate((first, second)):
            alone: list[Any] = []
            program(MODES[name], alone, lambda: None)
            assert looks(logs[n], "outside") == [before, before]
            inside = looks(logs[n], "inside")
            assert all(look == inside[0] for look in inside)
            assert inside == looks(alone, "inside")
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_coroutine_starts_under_the_state_in_which_it_was_made() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        coroutine = Coroutine(observe)
        expected = observe()
    coroutine.resume()
    assert coroutine.value == expected


def test_modes_entered_and_left_in_different_pieces() -> None:
    guards = [torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), CountFunctions()]
    for guard in guards:
        before = observe()

        coroutines: list[Coroutine] = []

        def run(guard=guard, coroutines=coroutines) -> None:
            guard.__enter__()
            coroutines[0].pause()
            guard.__exit__(None, None, None)

        coroutines.append(Coroutine(run))
        coroutines[0].resume()
        assert observe() == before
        coroutines[0].resume()
        assert coroutines[0].done
        assert observe() == before


def test_function_and_dispatch_modes_see_only_their_own() -> None:
    modes = {kind: [kind(), kind()] for kind in (CountFunctions, CountOperations)}
    for pair in modes.values():
        coroutines: list[Coroutine] = []

        def run(n: int, pair=pair, coroutines=coroutines) -> None:
            with pair[n]:
                for _ in range(n + 1):
                    torch.ones(3).add_(1)
                    coroutines[n].pause()

        coroutines += [Coroutine(lambda n=n, run=run: run(n)) for n in range(2)]
        for _ in range(3):
            for coroutine in coroutines:
                if not coroutine.done:
                    coroutine.resume()
                torch.ones(3).add_(1)
        assert pair[1].seen == 2 * pair[0].seen > 0


def test_default_device_changed_inside_is_not_seen_outside() -> None:
    def run() -> list[str]:
        torch.set_default_device("meta")
        seen = [torch.empty(1).device.type]
        coroutine.pause()
        seen += [torch.empty(1).device.type, torch.get_default_device().type]
        torch.set_default_device(None)
        return [*seen, torch.empty(1).device.type]

    coroutine = Coroutine(run)
    coroutine.resume()
    assert torch.empty(1).device.type == torch.get_default_device().type == "cpu"
    with torch.device("meta"):
        torch.set_default_device(None)  # whoever else sets it meanwhile
    coroutine.resume()
    assert coroutine.value == ["meta", "meta", "meta", "cpu"]
    assert torch.empty(1).device.type == "cpu"


def test_context_variables_are_seen_inside_and_stay_inside() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("caller")

    def run() -> list[str]:
        seen = [variable.get()]
        variable.set("mine")
        coroutine.pause()
        return [*seen, variable.get()]

    coroutine = Coroutine(run)
    coroutine.resume()
    assert variable.get() == "caller"
    variable.set("changed")
    coroutine.resume()
    assert coroutine.value == ["caller", "mine"]
    assert variable.get() == "changed"


def test_inner_coroutine_of_a_coroutine() -> None:
    """A staged call runs in a coroutine of its own inside the one of its request."""
    seen = []

    def inner() -> str:
        with torch.inference_mode():
            calls[0].pause()
            return "inner"

    def outer() -> str:
        with torch.autocast("cpu", torch.bfloat16):
            calls.append(Coroutine(inner))
            calls[0].resume()
            seen.append(observe()[1:3])
            programs[0].pause()
            calls[0].resume()
            seen.append(observe()[1:3])
        return calls[0].value

    calls: list[Coroutine] = []
    before = observe()
    programs = [Coroutine(outer)]
    programs[0].resume()
    assert observe() == before
    programs[0].resume()
    assert programs[0].value == "inner"
    assert observe() == before
    assert seen == [(False, (("cpu", True, torch.bfloat16),))] * 2


def test_resumed_by_another_than_its_maker() -> None:
    """The schedule resumes a call from wherever it ticks: from another program, or from none."""

    def call() -> list[bool]:
        seen = []
        with torch.no_grad():
            for _ in range(3):
                seen.append(torch.is_grad_enabled())
                calls[0].pause()
        return seen

    calls: list[Coroutine] = []

    def maker() -> None:
        calls.append(Coroutine(call))
        calls[0].resume()

    def other() -> bool:
        with torch.inference_mode():
            calls[0].resume()
            return torch.is_inference_mode_enabled()

    Coroutine(maker).resume()
    second = Coroutine(other)
    second.resume()
    assert second.value
    while not calls[0].done:
        calls[0].resume()
    assert calls[0].value == [False] * 3


def test_value_and_exception() -> None:
    coroutine = Coroutine(lambda: 7)
    assert not coroutine.done
    coroutine.resume()
    assert coroutine.done
    assert coroutine.value == 7

    def fail() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            failing.pause()
            raise KeyError("inside")

    before = observe()
    failing = Coroutine(fail)
    failing.resume()
    with pytest.raises(KeyError, match="inside"):
        failing.resume()
    assert failing.done
    assert failing.value is None
    assert observe() == before


class Leave(BaseException):
    """Not an Exception."""


def test_base_exceptions_pass() -> None:
    def fail() -> None:
        raise Leave

    with pytest.raises(Leave):
        Coroutine(fail).resume()


def test_only_the_coroutine_itself_may_pause_it() -> None:
    coroutine = Coroutine(lambda: None)
    with pytest.raises(RuntimeError, match="pause"):
        coroutine.pause()

    def inner() -> None:
        programs[0].pause()

    def outer() -> None:
        Coroutine(inner).resume()

    programs = [Coroutine(outer)]
    with pytest.raises(RuntimeError, match="pause"):
        programs[0].resume()


def test_kill() -> None:
    ended = []

    def run() -> None:
        try:
            with torch.inference_mode():
                coroutine.pause()
        finally:
            ended.append(observe())

    before = observe()
    coroutine = Coroutine(run)
    coroutine.resume()
    coroutine.kill()
    assert coroutine.done
    assert ended == [before]
    assert observe() == before
    coroutine.kill()  # nothing is left to end


@pytest.mark.parametrize("started", [False, True])
def test_kill_with_an_exception(started: bool) -> None:
    caught = []

    def run() -> None:
        try:
            coroutine.pause()
        except BaseException as error:
            caught.append(error)
            raise

    coroutine = Coroutine(run)
    if started:
        coroutine.resume()
    error = ValueError("cancelled")
    coroutine.kill(error)
    assert coroutine.done
    assert caught == ([error] if started else [])


def draw() -> tuple[Any, ...]:
    return (torch.rand(2).tolist(), random.random(), np.random.rand())


def test_generators() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    kept = Generators.capture()
    first = draw()
    second = draw()
    assert first != second
    kept.install()
    assert draw() == first
    kept.install()
    assert draw() == first
    assert draw() == second


def test_operations_in_python_run_to_their_end() -> None:
    """torch calls them through pybind11, which aborts the process if they end in another order than the reverse."""
    order: list[str] = []

    @torch.library.custom_op("shardit_tests::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        order.append(f"begin {int(x)}")
        yield_while_waiting()
        order.append(f"end {int(x)}")
        return x.clone()

    def run(number: int) -> None:
        yielding_coroutine.set(coroutines[number])
        yield_while_waiting()
        waits(torch.tensor(number))
        yield_while_waiting()
        order.append(f"last {number}")

    coroutines = [Coroutine(functools.partial(run, number)) for number in range(2)]
    while not all(one.done for one in coroutines):
        for one in coroutines:
            one.resume()
    assert order == ["begin 0", "end 0", "begin 1", "end 1", "last 0", "last 1"]
