#!/usr/bin/env python3
"""``kvcomp run`` under the name that the evaluation checklist uses: the same code, the same flags."""

import sys

from kvcomp.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
