"""`python -m textguard` is the command `textguard`."""

import sys

from textguard.assessment.command import main

if __name__ == "__main__":  # not in processes that read images, where the system starts them afresh
    sys.exit(main())
