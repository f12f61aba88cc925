"""`python -m tongkuan VERB ...`, which `./entrypoint.sh VERB ...` calls."""

import sys

from tongkuan.cli.exits import run

if __name__ == "__main__":
    sys.exit(run())
