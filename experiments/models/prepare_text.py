"""Collect the text the models are trained on, and the text held out from it.

Both come from the Python standard library's source (PSF licence): ``train.txt.xz`` has one module after another,
each followed by a NUL byte; ``held_out.txt`` has whole modules that training never sees (neither do their tests).

    python experiments/models/prepare_text.py --out DIR [--held-out experiments/data/held_out.txt]
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import os
import sys
import sysconfig
from pathlib import Path

HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "configparser.py",
    "dataclasses.py",
    "filecmp.py",
    "gettext.py",
    "queue.py",
    "sched.py",
    "textwrap.py",
)
# Installed packages, compiled files, and tables of characters, which are long and say nothing.
LEFT_OUT = ("site-packages", "__pycache__", "encodings", "_sysconfigdata")


def training_files(library: Path) -> list[Path]:
    """Every source file that training may see, in sorted order."""
    kept = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if any(part.startswith(LEFT_OUT) for part in relative.parts):
            continue
        if str(relative) in HELD_OUT or (relative.parts[0] == "test" and _tested_module(relative) in HELD_OUT):
            continue
        kept.append(path)
    return kept


def _tested_module(relative: Path) -> str:
    return relative.parts[1].removesuffix(".py").removeprefix("test_") + ".py" if len(relative.parts) > 1 else ""


def write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(data)
    os.replace(beside, path)
    print(f"{path}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of the source")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt.xz")
    parser.add_argument("--held-out", type=Path, help="also write the held-out text to this file")
    options = parser.parse_args()

    missing = [name for name in HELD_OUT if not (options.library / name).is_file()]
    if missing:
        print(f"prepare_text: --library: expected a folder with {missing[0]}, got {options.library}", file=sys.stderr)
        return 2
    documents = []
    for path in training_files(options.library):
        data = path.read_bytes().replace(b"\r\n", b"\n")
        try:
            data.decode()
        except UnicodeDecodeError:
            continue
        if data.strip() and b"\0" not in data:
            documents.append(data)
    text = b"".join(document + b"\0" for document in documents)
    print(f"{len(documents)} modules, {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()}")
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "train.txt.xz", lzma.compress(text, preset=6))
    if options.held_out:
        held_out = "".join((options.library / name).read_text("utf-8") for name in HELD_OUT)
        write(options.held_out, held_out.encode("ascii"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
