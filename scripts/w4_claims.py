#!/usr/bin/env python3
"""The seed's four claims, answered with figures: kvcomp.w4.claims."""

import sys

from kvcomp.w4.claims import main

if __name__ == "__main__":
    sys.exit(main())
