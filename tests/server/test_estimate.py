"""Expected costs of requests, and learning from earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardit.errors import InputError
from shardit.server import estimate
from shardit.server.estimate import MemorySample, Work, work_of
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions
from shardit.server.supervisor.cost_history import CostHistory
from tests.support.http_fake import IMAGE, VIDEO

GIB = 2**30


def work(size: int) -> Work:
    return Work(width=size, height=1, frames=1, steps=10, outputs=1, guided=False)


def test_work_follows_the_request_and_the_defaults_of_the_pipeline() -> None:
    takes = VIDEO.signature
    assert work_of({}, takes) == Work(832, 480, 81, 50, 1, guided=True)
    asked = {"width": 64, "height": 32, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0}
    assert work_of({**asked, "num_outputs_per_prompt": 2}, takes) == Work(64, 32, 9, 4, 2, guided=False)
    assert work_of({**asked, "extra_args": {"sigmas": [1.0, 0.5]}}, takes).steps == 2


def test_guidance_doubles_the_work_where_it_is_computed() -> None:
    takes = IMAGE.signature  # true_cfg_scale, which counts only with a negative prompt
    assert not work_of({}, takes).guided
    assert work_of({"negative_prompt": ""}, takes).guided
    assert not work_of({"negative_prompt": "", "true_cfg_scale": 1.0}, takes).guided
    assert not work_of({"guidance_scale": 7.0}, takes).guided  # the distilled one costs nothing
    once, twice = work_of({}, takes), work_of({"negative_prompt": "x"}, takes)
    assert twice.amount == 2 * once.amount


def test_speed_is_learned() -> None:
    small = work(1000)
    learned = estimate.learn_speed(None, small, 2.0)
    assert estimate.seconds(small, learned) == pytest.approx(2.0)
    for _ in range(50):
        learned = estimate.learn_speed(learned, small, 4.0)
    assert estimate.seconds(small, learned) == pytest.approx(4.0, rel=0.01)
    assert estimate.learn_speed(learned, small, 0.0) == learned
    assert estimate.seconds(small, None) > 0


def test_one_slow_request_does_not_outweigh_many() -> None:
    small = work(1000)
    learned = estimate.learn_speed(None, small, 1.0)
    assert estimate.seconds(small, estimate.learn_speed(learned, small, 100.0)) < 3.0


def test_without_knowledge_the_decoded_pixels_must_fit() -> None:
    estimate.refuse_if_too_large(work(GIB // 12), None, GIB)
    with pytest.raises(InputError, match="GiB"):
        estimate.refuse_if_too_large(work(GIB // 12 + 100), None, GIB)
    estimate.refuse_if_too_large(work(10**12), None, None)  # nothing is known at all


def test_memory_beyond_what_was_seen_grows_as_it_did() -> None:
    known = None
    for size, peak in ((0, 4 * GIB), (1_000_000, 6 * GIB), (2_000_000, 7 * GIB)):
        known = estimate.learn_memory(known, MemorySample(size, peak, limit_bytes=10 * GIB))
    known = json.loads(json.dumps(known))  # as the store keeps it
    assert estimate.expected_peak(1_500_000, known) == 7 * GIB
    assert estimate.expected_peak(4_000_000, known) == 9 * GIB
    estimate.refuse_if_too_large(work(5_000_000), known, None)
    with pytest.raises(InputError, match=r"5000001x1 .* would need about 10.0 GiB .* has 10.0 GiB"):
        estimate.refuse_if_too_large(work(5_000_001), known, None)


def test_failed_sizes_are_refused_until_they_fit() -> None:
    known = estimate.learn_memory(None, MemorySample(1000, 5, limit_bytes=GIB))
    known = estimate.learn_memory(known, MemorySample(3000, 0, out_of_memory=True))
    estimate.refuse_if_too_large(work(2999), known, None)
    with pytest.raises(InputError, match="3000 pixels"):
        estimate.refuse_if_too_large(work(3000), known, None)
    estimate.refuse_if_too_large(work(3000), estimate.reset_failures(known), None)
    estimate.refuse_if_too_large(work(3000), estimate.learn_memory(known, MemorySample(3000, 9)), None)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**12), st.booleans()), max_size=40), st.integers(1))
def test_fitting_sizes_are_accepted_until_they_fail(observations: list[tuple[int, int, bool]], limit: int) -> None:
    known, fitted = None, set()
    for size, peak, failed in observations:
        known = estimate.learn_memory(known, MemorySample(size, peak, limit_bytes=limit, out_of_memory=failed))
        assert len(known["points"]) <= 16
        fitted = {one for one in fitted if one < known["failed"]} if failed else {*fitted, size}
        if failed and size > 0:
            with pytest.raises(InputError, match=r"pixels|GiB"):
                estimate.refuse_if_too_large(work(size), known, limit)
    if (largest := max(fitted, default=0)) > 0:
        estimate.refuse_if_too_large(work(largest), known, limit)
        assert estimate.expected_peak(largest + 1, known) >= estimate.expected_peak(largest, known)


def test_restart_clears_failed_sizes_in_all_processes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    options = ServeOptions("tiny/flux", tmp_path)
    first = CostHistory(store, options)
    first.out_of_memory(1000)
    first.save()
    assert store.recall(estimate.MEMORY)["failed"] == 1000
    CostHistory(store, options).save()
    assert store.recall(estimate.MEMORY)["failed"] is None
    store.close()
