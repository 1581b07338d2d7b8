"""The guidance and data axes: calls of a step assigned to replicas, requests assigned to copies."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from shardit import DiffusionParallelConfig, InputError, Omni, parallelize
from shardit.core.comm.mesh import Mesh
from shardit.core.stages.guidance import GuidanceScheduler
from shardit.core.stages.result import Route
from shardit.models import tiny
from tests.diffusion.test_parallelize import join
from tests.parallel.test_tiles import Heard
from tests.pipelines.test_pipelines import BATCHED, compare, guidance, reference
from tests.support import brought
from tests.support.fork_servers import kept_fork_server
from tests.support.ranks import run_ranks
from tests.support.whole_pipelines import Case, difference, joined, staged

TWO = {"cfg_parallel_size": 2}


class Request:
    """Stands for a program."""


def test_calls_are_assigned_in_turn() -> None:
    guidance, first, second = GuidanceScheduler(2, 0, 0), Request(), Request()
    for program in (first, second):
        assert guidance.parts(program, 1) == 1
        assert [guidance.next(program), guidance.next(program), guidance.next(program)] == [0, 1, 0]


def test_a_batch_is_cut_once_the_branches_of_a_step_are_known() -> None:
    guidance, program = GuidanceScheduler(2, 0, 0), Request()
    assert guidance.parts(program, 4) == 1
    guidance.waits(program)
    assert guidance.parts(program, 4) == 2  # one call in a step: its samples are the work
    guidance, program = GuidanceScheduler(4, 0, 0), Request()
    assert [guidance.parts(program, 2), guidance.parts(program, 2)] == [1, 1]
    guidance.waits(program)
    guidance.waits(program)  # for the second result of the same step
    assert [guidance.parts(program, 2), guidance.parts(program, 2)] == [2, 2]


def test_more_replicas_than_work_is_an_error() -> None:
    guidance, program = GuidanceScheduler(3, 0, 0), Request()
    said = r"cfg_parallel_size=3 is more than the 2 branches x 1 samples .* at most 2"
    for _ in range(2):
        guidance.parts(program, 1)
    with pytest.raises(InputError, match=said):  # also where there is one step only
        guidance.waits(program)
    with pytest.raises(InputError, match=said):
        guidance.parts(program, 1)
    guidance.begin(program)  # another call of the pipeline may have more
    assert [guidance.parts(program, 2), guidance.parts(program, 2)] == [1, 1]
    guidance.waits(program)
    assert [guidance.parts(program, 2), guidance.parts(program, 2)] == [2, 2]


def test_idle_axis_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    guidance, program = GuidanceScheduler(2, 0, 0), Request()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert guidance.parts(program, 1) == 1
            guidance.waits(program)
    assert len(caplog.records) == 1
    assert "guidance_scale > 1" in caplog.text


def test_branches_run_on_different_replicas() -> None:
    """Bit-equal where the pipeline calls the model once for each branch; every replica ran half of the calls."""
    names = ("wan2.2-t2v", "qwen-image-edit", "longcat-image")
    cases = [Case(name, 1, call=guidance(name), axes=TWO) for name in names]
    for of_ranks in compare(cases):
        for name, blocks in of_ranks[0]["ran"].items():
            first, second = (r["calls"][name] for r in of_ranks)
            assert abs(first - second) <= blocks  # one forward, where their number is odd


def test_a_batch_is_assigned_by_sample() -> None:
    cases = [Case(name, 1, split_batch=True, call=guidance(name), axes=TWO) for name in BATCHED]
    close(cases)


@pytest.mark.full
def test_guidance_over_stages_and_requests_in_flight() -> None:
    axes = {"cfg_parallel_size": 2}
    call = guidance("wan2.2-ti2v")
    compare(
        [
            Case("wan2.2-ti2v", 2, in_flight=2, requests=3, call=call, axes=axes),
            Case("wan2.2-t2v", 2, 1, call=guidance("wan2.2-t2v"), axes=axes),
        ]
    )


def test_without_guidance_the_axis_idles_and_the_result_is_right() -> None:
    compare([Case("wan2.2-t2v", 1, call={"guidance_scale": 1.0}, axes=TWO)])


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_model_with_guidance(dtype: str) -> None:
    names = [name for name in tiny.names() if name not in BATCHED]
    compare([Case(name, 1, dtype=dtype, call=guidance(name), axes=TWO) for name in names])


def close(cases: list[Case], bound: float = 1e-5) -> None:
    results = run_ranks(cases[0].config().world_size, staged, cases)
    for number, case in enumerate(cases):
        of_ranks = [result[number] for result in results]
        assert joined(of_ranks, "errors") == [None]
        assert 0 < difference(reference(case)[0], joined(of_ranks, "arrays")[0]) <= bound, case


def called_again(rank: int, count: int, method: str) -> list[str]:
    """Calls of one pipeline are independent: same bits, and each logs that the axis idles."""
    join(rank, count, method)
    said = Heard().lines
    config = DiffusionParallelConfig(**TWO)
    pipe = parallelize(brought.pipeline("sd3.5"), config, timeout_s=60)
    first, second = (brought.run(pipe, "sd3.5") for _ in range(2))
    assert torch.equal(first, second)
    pipe = parallelize(brought.pipeline("wan2.2-ti2v"), config, timeout_s=60)
    brought.run(pipe, "wan2.2-ti2v", num_inference_steps=2)
    assert not said
    brought.run(pipe, "wan2.2-ti2v", num_inference_steps=1, guidance_scale=1.0)
    return said


def test_calls_of_one_pipeline_are_assigned_alike() -> None:
    for name in ("sd3.5", "wan2.2-ti2v"):
        tiny.resolve(f"tiny/{name}")
    first, second = run_ranks(2, called_again)
    assert (len(first), len(second)) == (1, 0)
    assert "guidance_scale > 1" in first[0]


def broken(rank: int, count: int, method: str, case: Case) -> Any:
    def send(self: Route, message: torch.Tensor) -> None:
        own_send(self, torch.zeros_like(message))

    own_send, Route.send = Route.send, send
    return staged(rank, count, method, [case])[0]


def test_broken_communication_is_seen() -> None:
    """The comparison can fail: with zeros in place of the other replica's results the pictures differ."""
    case = Case("wan2.2-t2v", 1, call=guidance("wan2.2-t2v"), axes=TWO)
    of_ranks = run_ranks(2, broken, case)
    assert not np.array_equal(reference(case)[0], joined(of_ranks, "arrays")[0])


def test_requests_are_assigned_to_copies() -> None:
    axes = {"data_parallel_size": 2}
    (of_ranks,) = compare([Case("wan2.2-ti2v", 1, requests=3, axes=axes)])
    assert [sorted(r["arrays"]) for r in of_ranks] == [[0, 2], [1]]


def unassigned(rank: int, count: int, method: str, case: Case) -> Any:
    own = Mesh.coords.fget
    Mesh.coords = property(lambda self: {**own(self), "dp": 0})  # type: ignore[method-assign, misc]
    return staged(rank, count, method, [case])[0]


def test_copies_running_the_same_requests_are_detected() -> None:
    of_ranks = run_ranks(2, unassigned, Case("wan2.2-ti2v", 1, requests=2, axes={"data_parallel_size": 2}))
    assert [sorted(r["arrays"]) for r in of_ranks] != [[0], [1]]


@pytest.mark.full
def test_copies_of_pipelines_with_guidance() -> None:
    axes = {"data_parallel_size": 2, "cfg_parallel_size": 2}
    compare([Case("wan2.2-ti2v", 2, requests=2, call=guidance("wan2.2-ti2v"), axes=axes)])


def test_omni_deals_requests_and_keeps_their_order() -> None:
    config = DiffusionParallelConfig(data_parallel_size=2)
    with kept_fork_server(), Omni("tiny/wan2.2-ti2v", parallel_config=config) as omni:
        call = {**tiny.defaults("wan2.2-ti2v"), "output_type": "latent"}
        prompts: list[Any] = [{"prompt": text, "seed": 5} for text in ("a cat", "a dog", "a cat")]
        # Refused by the pipeline, as there is a prompt: this request alone fails.
        prompts[1]["prompt_embeds"] = torch.zeros(1)
        outputs = omni.generate(prompts, **call)
        assert [output.prompt for output in outputs] == ["a cat", "a dog", "a cat"]
        assert [output.error is None for output in outputs] == [True, False, True]
        assert torch.equal(outputs[0].latents, outputs[2].latents)
        assert all(len(output.peak_bytes) == 2 for output in outputs)
        assert omni.generate("a cat", seed=5, **call)[0].error is None  # the second copy has nothing to do


def fails_later(rank: int, count: int, method: str) -> list[str]:
    """Call a pipeline whose model fails outside of its blocks in the second step, for one branch alone; then again."""
    join(rank, count, method)
    pipe, state = brought.pipeline("flux"), {"armed": False}
    parallelize(pipe, timeout_s=20, **TWO)

    def fail(*_: Any) -> None:
        if state["armed"]:
            raise ValueError("mine")

    def arm(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        state["armed"] = step == 0
        return values

    pipe.transformer.x_embedder.register_forward_pre_hook(fail)
    said = []
    for callback in (None, arm, None):
        state["armed"] = False
        try:
            brought.guided(pipe, "flux", callback_on_step_end=callback)
            said.append("right")
        except ValueError as error:
            said.append(str(error))
    return said


def test_an_error_before_the_first_block_is_raised_on_all_ranks() -> None:
    """Under guidance a call runs on one rank, which alone meets it; the other does not wait for its result."""
    assert run_ranks(2, fails_later) == [["right", "mine", "right"]] * 2
