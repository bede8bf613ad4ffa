"""Experiment files: any text, read as one, and what becomes of it for prompts of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcomp.experiment import config
from reader import refusing
from scratch import FOLDER

_PATH = FOLDER / "experiment.yaml"
_LENGTHS = (1, 17, 4096, 131072)


def target(data: bytes) -> None:
    _PATH.write_bytes(data)
    found = None
    with refusing(ValueError, sentence="config: "):
        found = config.load(_PATH)
    if found is None:
        return
    for length in _LENGTHS:
        with refusing(ValueError, sentence="[a-z]+: "):
            config.to_policy(found, prompt_tokens=length)


def words() -> list[bytes]:
    """Keys and choices of the schema, and YAML's own marks."""
    found = [
        "<<: ",
        "&a ",
        "*a",
        "!!",
        "!!int ",
        "!!timestamp ",
        "- ",
        "? ",
        "---",
        "0x",
        "1e400",
        ".inf",
        ".nan",
        "0b",
    ]

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            found.extend(f"{name}: " for name in schema.get("properties", {}))
            found.extend(str(choice) for choice in schema.get("enum", ()))
            for part in schema.values():
                walk(part)
        elif isinstance(schema, list):
            for part in schema:
                walk(part)

    walk(config.ExperimentConfig.model_json_schema())
    return [word.encode() for word in dict.fromkeys(found)]


def seeds() -> list[bytes]:
    folder = Path(__file__).resolve().parents[1] / "experiments"
    return [path.read_bytes() for path in sorted(folder.glob("*.yaml"))]
