"""``python -m hpcasync``: the command line."""

import sys

from hpcasync.cli import main

if __name__ == "__main__":
    sys.exit(main())
