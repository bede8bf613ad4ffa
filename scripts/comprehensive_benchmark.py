#!/usr/bin/env python3
"""``kvcomp bench bsr`` under the name that the validation plan uses: the same code, the same flags."""

import sys

from kvcomp.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "bsr", *sys.argv[1:]]))
