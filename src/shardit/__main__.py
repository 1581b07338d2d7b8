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
        from shardit.errors import note_interrupt

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, note_interrupt)
        from shardit.cli import main as run

        code = run()
    except KeyboardInterrupt:  # who pressed it knows
        code = INTERRUPTED
    except Exception as error:
        code = _failed_import(error)
    end_process(code)
    return code


def _failed_import(error: Exception) -> int:
    """Return the exit code of an error within the imports of the command line: Ctrl-C, or a missing package."""
    from shardit.errors import is_interrupt
    from shardit.loading.missing_packages import missing_package

    if is_interrupt(error):
        return INTERRUPTED
    if not isinstance(error, ModuleNotFoundError) or (error.name or "").partition(".")[0] == "shardit":
        raise error
    print(f"error: {missing_package(error)}", file=sys.stderr)
    return 2


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
