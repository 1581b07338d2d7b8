"""One thread everywhere: results that are compared bit by bit must not depend on the number of cores. And no process
groups left by an earlier test."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import long_tests

TESTS = Path(__file__).parent

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A thread that a message wakes must not take the core from the one that sends it: gloo's thread would spin on a lock
# that the sender holds, for most of the time of a core if there are fewer cores than ranks. All processes inherit this.
if hasattr(os, "SCHED_BATCH"):
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST_FIRST = (
    "training/test_gradients.py",
    "language/test_llm.py",
    "diffusion/test_changes.py",
    "language/test_reports.py",
    "training/diffusion/test_adapters.py",
    "pipelines/test_pipelines.py",
    "language/test_real_weights.py",
    "engine/test_omni.py",
    "training/diffusion/test_batches.py",
    "parallel/test_sequence.py",
    "language/test_tensor.py",
    "language/test_vision.py",
    "server/test_ray_nodes.py",
    "diffusion/test_changes_of_code.py",
    "loading/test_tiny.py",
    "core/test_kept_state.py",
    "language/batching/test_scheduling_reports.py",
    "training/run/test_resume.py",
    "server/test_supervisor.py",
    "training/test_shapes_example.py",
)
"""Files whose tests take longest: if they came last, all other processes would wait for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests, and put the tests of long files first."""
    ids = long_tests.listed()
    for item in items:
        if long_tests.is_long(item.nodeid, ids):
            item.add_marker("long")
    places = {str(TESTS / name): place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_collection_finish() -> None:
    """Hide the objects of imports from the garbage collector, which would scan all of them repeatedly."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_groups_left() -> Iterator[None]:
    yield
    if "shardit.parallel_state" in sys.modules:
        sys.modules["shardit.parallel_state"].destroy_model_parallel()


# Servers and a browser for the tests of HTTP and of the page. They are imported where they are used: other tests need
# neither.


@pytest.fixture(scope="session")
def commands() -> Iterator[Any]:
    """Command lines in forked processes (`light.LightCommands`)."""
    from tests.support.light import light_commands

    with light_commands() as made:
        yield made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of an image model (`http_fake.Served`)."""
    from tests.support.http_fake import IMAGE, serving

    with serving(tmp_path_factory.mktemp("images"), IMAGE) as served:
        yield served


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of an audio model (`http_fake.Served`)."""
    from tests.support.http_fake import AUDIO, serving

    with serving(tmp_path_factory.mktemp("sounds"), AUDIO) as served:
        yield served


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of a language model (`http_fake.Served`)."""
    from tests.support.text_fake import served_texts

    with served_texts(tmp_path_factory.mktemp("texts")) as served:
        yield served


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of a video model (`http_fake.Served`)."""
    from tests.support.http_fake import VIDEO, serving

    with serving(tmp_path_factory.mktemp("videos"), VIDEO) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium (`playwright.sync_api.Browser`)."""
    from tests.support.browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Any, images: Any) -> Iterator[Any]:
    """The page of the image server in a browser (`browser.Visit`)."""
    from tests.support.browser import visiting

    with visiting(browser, images.url) as visit:
        yield visit


@pytest.fixture
def servers(tmp_path: Any) -> Iterator[Any]:
    """The processes of a server on several nodes (`nodes.Servers`)."""
    from tests.support.nodes import Servers

    made = Servers(tmp_path)
    try:
        yield made
    finally:
        made.close()
