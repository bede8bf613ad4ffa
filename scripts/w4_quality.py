#!/usr/bin/env python3
"""Perplexity and task accuracy of models with 4-bit weights: kvcomp.w4.quality."""

import sys

from kvcomp.w4.quality import main

if __name__ == "__main__":
    sys.exit(main())
