"""A folder of this process."""

import tempfile
from pathlib import Path

_held = tempfile.TemporaryDirectory(prefix="fuzz-")
FOLDER = Path(_held.name)
