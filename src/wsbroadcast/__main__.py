"""`python -m wsbroadcast`."""

import sys

from wsbroadcast.command import main

if __name__ == "__main__":
    sys.exit(main())
