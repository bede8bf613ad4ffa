#!/usr/bin/env python
"""One target under atheris, with libFuzzer's arguments: what ``run.py`` starts. The target's module comes in the
environment, so that libFuzzer can start this again by itself (``-merge``).

Coverage comes from kvcomp's Python modules, the target's own, and, as C code gives none, from the refusals that were
heard: each kind of sentence is a branch of its own.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris
import reader

_BRANCHES = 1024


def _branches() -> Callable[[int], None]:
    """A function of a number below _BRANCHES, with a branch for each: nested halves."""

    def halves(low: int, high: int, indent: str) -> str:
        if high - low == 1:
            return f"{indent}return None\n"
        middle = (low + high) // 2
        below, above = halves(low, middle, indent + " "), halves(middle, high, indent + " ")
        return f"{indent}if n < {middle}:\n{below}{indent}else:\n{above}"

    made: dict[str, Callable[[int], None]] = {}
    exec(f"def branch(n):\n{halves(0, _BRANCHES, ' ')}", made)
    found: Callable[[int], None] = atheris.instrument_func(made["branch"])
    return found


def main() -> None:
    path = Path(os.environ["KVCOMP_FUZZ_TARGET"])
    sys.path.insert(0, str(path.parent))
    with atheris.instrument_imports(include=["kvcomp", path.stem]):
        module = importlib.import_module(path.stem)
    branch = _branches()
    reader.heard = lambda sentence: branch(zlib.crc32(sentence.encode("utf-8", "replace")) % _BRANCHES)
    folder = Path(os.environ["TMPDIR"])
    (folder / "seeds").mkdir(exist_ok=True)
    for i, seed in enumerate(getattr(module, "seeds", list)()):
        (folder / "seeds" / str(i)).write_bytes(seed)
    words = ["".join(f"\\x{byte:02x}" for byte in word) for word in getattr(module, "words", list)()]
    (folder / "words").write_text("# what the target names\n" + "".join(f'"{word}"\n' for word in words))
    dictionary = [f"-dict={folder / 'words'}"] if words else []

    def target(data: bytes) -> None:
        try:
            module.target(data)
        except BaseException:  # libFuzzer writes it too, by this name, unless the interpreter dies while it leaves
            (folder / "found" / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            raise

    atheris.Setup([str(Path(__file__).resolve()), *dictionary, *sys.argv[1:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
