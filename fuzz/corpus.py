"""A target's corpus: one text file, an input a line, base64."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path

TARGETS = ("pages", "saves", "configs", "arguments")
FUZZ = Path(__file__).resolve().parent


def read(folder: Path, target: str) -> list[bytes]:
    path = folder / f"{target}.txt"
    return [base64.b64decode(line) for line in path.read_text().split()] if path.exists() else []


def write(folder: Path, target: str, inputs: Iterable[bytes]) -> None:
    """The empty input is tried anyway, and is left out."""
    lines = sorted({base64.b64encode(data).decode() for data in inputs if data}, key=lambda line: (len(line), line))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines))


def findings(folder: Path, target: str) -> list[Path]:
    """Inputs that once were findings; beside each a text says what was found."""
    return sorted(path for path in (folder / target).glob("*") if path.suffix != ".txt")
