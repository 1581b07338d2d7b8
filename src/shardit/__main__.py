"""`python -m shardit` is the `shardit` command."""

import sys

from shardit.cli import main

if __name__ == "__main__":
    sys.exit(main())
