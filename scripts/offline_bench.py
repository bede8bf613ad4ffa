#!/usr/bin/env python3
"""``python -m kvcomp.bench.offline`` under the seed's name: the same code, the same flags."""

import sys

from kvcomp.bench.offline import main

if __name__ == "__main__":
    sys.exit(main())
