"""Exceptions on their way to other ranks: of the same class where it can be rebuilt, else with name and text."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from shardit import DiffusionParallelConfig
from shardit.core.comm.barrier import RemoteError, sendable
from shardit.errors import RankError
from tests.core.test_ranks_agree import run
from tests.diffusion.test_parallelize import join
from tests.support.brought import pipeline
from tests.support.ranks import run_ranks


class Stopped(Exception):
    """Its constructor takes two arguments, and gives one to its base."""

    def __init__(self, step: int, reason: str):
        super().__init__(f"stopped at step {step}: {reason}")
        self.step = step


class Counted(Exception):
    """Pickled by its args, its text would grow."""

    def __init__(self, code: object):
        super().__init__(f"code {code}")


class Shown(Exception):
    """It has a text of its own, and required keywords."""

    def __init__(self, *, code: int):
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


def received(error: Exception) -> Any:
    return pickle.loads(pickle.dumps(sendable(error)))


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyError("name"), OSError(2, "none", "file"), RankError(1, "gone")]
)
def test_plain_exceptions_are_unchanged(error: Exception) -> None:
    assert (type(received(error)), str(received(error))) == (type(error), str(error))
    assert received(error).args == error.args


@pytest.mark.parametrize("error", [Stopped(3, "enough"), Counted(5), Shown(code=7)])
def test_exceptions_with_constructors_of_their_own(error: Exception) -> None:
    got = received(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert got.args == error.args
    assert vars(got) == vars(error)


def test_unpicklable_exceptions_keep_name_and_text() -> None:
    class Local(Exception):
        pass

    held = Stopped(1, "held")
    held.lock = threading.Lock()  # type: ignore[attr-defined]
    assert (type(received(Local("here"))), str(received(Local("here")))) == (RemoteError, "Local: here")
    assert str(received(held)) == "Stopped: stopped at step 1: held"


def on_rank(rank: int, count: int, method: str) -> list[str]:
    import shardit

    join(rank, count, method)
    pipe = shardit.parallelize(
        pipeline("flux"), DiffusionParallelConfig(pipeline_parallel_size=2, split_batch=False), timeout_s=60
    )

    class Local(Exception):
        pass

    def failing(error: Exception, ranks: tuple[int, ...]) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if rank in ranks:
                raise error
            return given

        return callback

    said = []
    for error, ranks in (
        (Stopped(0, "enough"), (0,)),
        (Counted(5), (1,)),
        (Local("all"), (0, 1)),
        (Local("one"), (0,)),
    ):
        with pytest.raises(Exception) as caught:
            run(pipe, callback_on_step_end=failing(error, ranks))
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    return said


def test_errors_of_callbacks_arrive_as_their_class() -> None:
    first = ["Stopped: stopped at step 0: enough", "Counted: code 5", "Local: all"]
    assert run_ranks(2, on_rank) == [[*first, "Local: one"], [*first, "RemoteError: Local: one"]]
