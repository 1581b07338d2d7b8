"""A rank of a run of the toy recipe under torchrun: `-m tests.training.run.joined FOLDER MODEL`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shardit.engine.process.exit_code import ended_by
from shardit.training.run.launch import run_joined
from tests.training.run.runs import spec

if __name__ == "__main__":
    size = int(os.environ["WORLD_SIZE"])
    try:
        early = run_joined(spec(Path(sys.argv[1]), model=sys.argv[2], steps=30, pipeline_parallel_size=size))
    except Exception as error:
        sys.exit(ended_by(error))
    sys.exit(130 if early else 0)
