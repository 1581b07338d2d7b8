"""The tool that runs random programs: one of them, and what it tells of differences."""

from __future__ import annotations

import random

import numpy as np

from tests.pipelines.random_programs import ACTIONS, Step, compared, on_ranks, program, run
from tests.support.ranks import run_ranks

STEPS: list[Step] = [step for step in program(random.Random(1)) if step[0] == "call"][:1]


def test_a_program_is_right_on_ranks() -> None:
    axis = {"pipeline_parallel_size": 2, "split_batch": False}
    plain = run("flux", STEPS, "", lambda pipe: pipe)
    assert compared(STEPS, plain, run_ranks(2, on_ranks, "flux", STEPS, "", axis)) == "right"


def test_differences_are_told() -> None:
    steps: list[Step] = [("hook", 0.0, {}), ("call", 0.0, {})]
    plain = [None, [np.ones(3)]]
    assert {step[0] for step in steps} <= set(ACTIONS)
    assert compared(steps, plain, [[None, [np.ones(3)]], [None, [np.ones(3) * 1.1]]]) == (
        "step 1 (call) on rank 1: WRONG, 1.0e-01 off"
    )
    assert "WRONG, plain gives" in compared(steps, plain, [[None, [np.ones(4)]]])
    assert compared(steps, plain, [["refused: no", None]]) == "step 0 (hook) on rank 0: refused: no"
    assert "a call that fails in plain diffusers" in compared(steps, [None, "ValueError: no"], [[None, None]])
