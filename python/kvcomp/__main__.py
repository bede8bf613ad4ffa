"""``python -m kvcomp``: the same as ``kvcomp``."""

import sys

from .cli import main

sys.exit(main())
