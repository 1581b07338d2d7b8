"""Goes on with a run while no file may become large: `python -m tests.training.run.small_disk FOLDER`."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from shardit.engine.process.exit_code import ended_by
from tests.training.run.runs import run

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        run(Path(sys.argv[1]), steps=5, save_every=2, resume=True)
    except Exception as error:
        sys.exit(ended_by(error))
