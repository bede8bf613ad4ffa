"""What a long run keeps of its finished units while it goes on, so that an interrupted one can be taken up again.

The file lies beside the report as ``<report>.partial`` and is written whole after every unit. It belongs to one
command: ``key`` is a digest of everything that the figures depend on, and a file with another key is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import results

SCHEMA = "kvcomp.partial/1"


class Interrupted(Exception):
    """The user stopped a run; the sentence says what was kept."""


class Units:
    """Finished units by name; with a report's path kept in a file, else in memory only."""

    def __init__(self, report: Path | None, depends_on: Any) -> None:
        """``depends_on``: JSON values. Raises ValueError where the file beside ``report`` is another command's."""
        self.path = None if report is None else report.with_name(report.name + ".partial")
        self._key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self._done: dict[str, Any] = self._load() if self.path is not None and self.path.exists() else {}
        self.resumed = len(self._done)

    def _load(self) -> dict[str, Any]:
        assert self.path is not None
        try:
            loaded = json.loads(self.path.read_text(encoding="utf-8"))
            same = loaded["schema"] == SCHEMA and loaded["key"] == self._key
            done = dict(loaded["units"])
        except (ValueError, TypeError, KeyError):
            same, done = False, {}
        if not same:
            raise ValueError(
                f"--report-path: expected the partial file of this very command at {self.path}, "
                "got another's; delete it or choose another report"
            )
        return done

    def get(self, name: str, work: Callable[[], Any]) -> Any:
        """The unit's result (JSON values): what was kept of an earlier run, or what ``work`` gives, kept at once."""
        if name not in self._done:
            self._done[name] = work()
            if self.path is not None:
                results.write(self.path, {"schema": SCHEMA, "key": self._key, "units": self._done})
        return self._done[name]

    def __contains__(self, name: object) -> bool:
        return name in self._done

    def __len__(self) -> int:
        return len(self._done)

    def kept(self) -> str:
        """What an interrupted user wants to know."""
        if self.path is None:
            return "interrupted; nothing is kept without --report-path"
        if not self._done:
            return "interrupted before the first unit was done; nothing is kept"
        return f"interrupted; {len(self._done)} units are kept in {self.path}, the same command goes on from there"

    def finish(self) -> None:
        """The report stands: nothing partial is left."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
