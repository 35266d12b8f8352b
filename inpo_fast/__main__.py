"""`python -m inpo_fast` is `inpo-fast`."""

import sys

from inpo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
