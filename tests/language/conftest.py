"""All tests of language models take their ranks from fork servers that stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fork_servers import kept_fork_server


@pytest.fixture(scope="package", autouse=True)
def _fork_server() -> Iterator[None]:
    with kept_fork_server():
        yield
