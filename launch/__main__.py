"""`python -m launch RECIPE…` is `trainsys launch RECIPE…`; this package knows no recipe itself."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "trainsys", "launch", *sys.argv[1:]])
