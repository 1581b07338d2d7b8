"""Whole calls of pipeline classes of diffusers over two ranks: the same result as plain, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from tests.pipelines import table
from tests.pipelines.entry import entries, not_built, pipeline_classes
from tests.pipelines.measure import measure, merged, note
from tests.pipelines.refused import REFUSED
from tests.pipelines.runs import AXES, NotSame, Outcome, distance
from tests.support.matrix_page import PAGE, SURVEY


def check(outcomes: Sequence[Outcome]) -> None:
    """Check that every outcome is right, or refused as expected."""
    bad = []
    for outcome in outcomes:
        expected = REFUSED.get(outcome.name, {}).get(outcome.axis)
        if outcome.kind == "plain" or (expected is None and outcome.kind == "right"):
            continue
        if outcome.kind != "refused" or expected is None or expected not in outcome.message:
            bad.append(f"{outcome.name}, {outcome.axis}: {outcome.kind}, {outcome.message}")
    assert not bad, "\n".join(bad)


def test_a_few_pipelines() -> None:
    names = [name for name, entry in entries().items() if entry.fast]
    outcomes = measure([(name, axis) for name in names for axis in AXES], timeout=200)
    check(outcomes)
    assert len(outcomes) == len(names) * len(AXES) >= 6
    assert all(outcome.kind != "plain" for outcome in outcomes)
    assert all(outcome.held < 1 for outcome in outcomes), outcomes  # what a rank did not hold it cannot have computed


def test_arguments_that_calls_change() -> None:
    """A list that only the rank that runs a call empties, and a cache whose layers are filled where they run."""
    names = (
        ("StableDiffusionAdapterPipeline", "cfg 2"),
        ("QwenImage21Pipeline", "pp 2"),
        ("QwenImage21Pipeline", "cfg 2"),
    )
    for outcome in measure(names, timeout=100):
        assert outcome.kind == "right", outcome.message


def test_batches_of_frames_and_kept_attention_maps() -> None:
    """Frames of a batch attend to the first one, though the first calls have one frame; a processor keeps the map of
    attention for the pipeline."""
    names = ("TextToVideoZeroPipeline", "StableDiffusionSAGPipeline")
    check(measure([(name, "ulysses 2") for name in names], timeout=100))


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("letter", sorted({name[0] for name in entries()}))
def test_every_pipeline(letter: str) -> None:
    tasks = [(name, axis) for name in entries() if name[0] == letter for axis in AXES]
    outcomes = measure(tasks, timeout=850)
    note(outcomes)
    check(outcomes)


def test_every_class_has_an_entry_or_a_reason() -> None:
    classes = pipeline_classes()
    assert len(classes) > 200
    without = [name for name, rule in classes.items() if not rule and name not in {**entries(), **not_built()}]
    assert not without
    assert not {name for name in {**entries(), **not_built()} if name not in classes}
    assert not entries().keys() & not_built().keys()


def test_the_page_has_every_class() -> None:
    section = PAGE.read_text(encoding="utf-8").partition(SURVEY)[2]
    without = [name for name in pipeline_classes() if not re.search(rf"^(\| |- ){name}[ :,]", section, re.MULTILINE)]
    assert not without


def test_a_page_needs_all_results() -> None:
    results = {(name, axis): Outcome(name, axis, "right", held=0.5) for name in entries() for axis in AXES}
    first, *_, last = entries()
    results[first, "tp 2"] = Outcome(first, "tp 2", "refused", message="a line\nuse 1")
    page = table.render(results)
    assert f"| {last} | = | = | = |" in page
    assert f"| {first} | = | = | refused |" in page
    assert f"- {first}, tp 2: use 1" in page
    assert f"tp 2: of {len(entries())} pipelines {len(entries()) - 1} right" in page
    del results[last, "pp 2"]
    with pytest.raises(SystemExit, match=f"{last} pp 2"):
        table.render(results)


def test_the_comparison_can_fail() -> None:
    one = np.ones((2, 3), np.float32)
    assert distance([one], [one.copy()]) == 0
    assert distance([one], [one + np.float32(1e-6)]) > 0
    assert distance([one * np.nan], [one]) != 0
    with pytest.raises(NotSame):
        distance([one], [one[:1]])
    with pytest.raises(NotSame):
        distance([one], [one, one])
    with pytest.raises(NotSame):
        distance([np.asarray("a")], [np.asarray("b")])
    right, refused = (Outcome("P", "pp 2", kind) for kind in ("right", "refused"))
    assert merged([right, refused]).kind == "failed"  # one rank would have waited for the other
