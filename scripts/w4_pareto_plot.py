#!/usr/bin/env python3
"""What scales cost and what they buy, as a picture: kvcomp.w4.pareto."""

import sys

from kvcomp.w4.pareto import main

if __name__ == "__main__":
    sys.exit(main())
