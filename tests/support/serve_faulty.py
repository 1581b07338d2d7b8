"""`shardit serve` with the session of tests/support/real_session.py, whose prompts can ask for faults."""

from __future__ import annotations

import sys

from shardit.cli import main
from shardit.server.supervisor.supervisor import Supervisor

if __name__ == "__main__":
    Supervisor._session = "real_session:Session"
    sys.exit(main(["serve", *sys.argv[1:]]))
