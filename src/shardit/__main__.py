"""The `shardit` command, also as `python -m shardit`."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> int:
    """Run the command line and return the exit code, which is the same for Ctrl-C while it is still being imported."""
    try:
        from shardit.cli import main as run

        return run()
    except KeyboardInterrupt:  # who pressed it knows
        return INTERRUPTED
    except ModuleNotFoundError as error:  # a package of the command line itself: typer, pillow
        from shardit.loading.missing import missing_package

        if (error.name or "").partition(".")[0] == "shardit":
            raise
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
