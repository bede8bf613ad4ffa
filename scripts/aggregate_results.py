#!/usr/bin/env python3
"""Means and 95 % intervals of the offline bench's repeats: kvcomp.bench.aggregate."""

import sys

from kvcomp.bench.aggregate import main

if __name__ == "__main__":
    sys.exit(main())
