"""The fork server of runs of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fork_servers import kept_fork_server


@pytest.fixture(scope="module")
def one_fork_server() -> Iterator[None]:
    """All runs of a module start from one fork server."""
    with kept_fork_server():
        yield
