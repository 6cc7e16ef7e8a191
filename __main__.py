"""Runs the front door: `python -m homespun` from the wheel, `python path/to/repository` from a clone."""

import sys

from homespun import main

if __name__ == "__main__":
    sys.exit(main())
