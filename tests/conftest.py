"""One thread everywhere: what is compared bit by bit must not depend on how many cores a machine has. And no groups
that a test before has left in this process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_groups_left() -> Iterator[None]:
    yield
    if "shardit.parallel_state" in sys.modules:
        sys.modules["shardit.parallel_state"].destroy_model_parallel()
