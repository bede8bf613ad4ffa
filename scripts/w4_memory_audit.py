#!/usr/bin/env python3
"""Bytes that every configuration of the matrix holds: kvcomp.w4.analysis."""

import sys

from kvcomp.w4.analysis import main_audit as main

if __name__ == "__main__":
    sys.exit(main())
