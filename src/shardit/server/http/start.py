"""Starts the API process, and reports in one line packages that cannot be imported."""

from __future__ import annotations

import sys

from shardit.loading.missing_packages import missing_package
from shardit.server.process.api_process import UNABLE


def main(control_fd: int, listen_fd: int) -> int | None:
    """Import the API process and run it, as its own `main`; returns UNABLE if it cannot be imported."""
    try:
        from shardit.server.http.main import main as run
    except ImportError as error:
        if (error.name or "").startswith("shardit"):
            raise
        print(f"error: the server cannot answer HTTP: {missing_package(error)}", file=sys.stderr)
        return UNABLE
    return run(control_fd, listen_fd)
