"""The `shardit` command, also as `python -m shardit`."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line and return the exit code, which is the same for Ctrl-C during its imports."""
    try:
        from shardit.cli import main as run

        code = run()
    except KeyboardInterrupt:  # who pressed it knows
        code = INTERRUPTED
    except Exception as error:
        from shardit.errors import is_interrupt

        if not is_interrupt(error):
            raise
        code = INTERRUPTED
    end_process(code)
    return code


def end_process(code: int) -> None:
    """Exit without the interpreter's own end, which takes long if torch has been or is being imported."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # if Ctrl-C is pressed again
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or its reader is gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
