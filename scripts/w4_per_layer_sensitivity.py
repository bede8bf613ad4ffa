#!/usr/bin/env python3
"""Error of every layer's weights at several scales: kvcomp.w4.analysis."""

import sys

from kvcomp.w4.analysis import main_sensitivity as main

if __name__ == "__main__":
    sys.exit(main())
