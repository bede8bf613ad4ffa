"""Where the shipped model, text and experiment files are."""

from __future__ import annotations

from pathlib import Path

MODEL = Path("models") / "tiny-base"
TEXT = Path("data") / "held_out.txt"


def shipped(name: Path, flag: str, *, beside: Path | None = None) -> Path:
    """A file or folder under ``experiments/``: beside the experiment file at hand, in the folder that the command runs
    in, or in the source tree. ValueError where it is in none of them (an installed wheel has no models)."""
    folders = [Path("experiments"), Path(__file__).resolve().parents[3] / "experiments"]
    if beside is not None:
        folders.insert(0, beside.parent)
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{flag}: expected a path, as experiments/{name} is not here (it comes with the source tree)")
