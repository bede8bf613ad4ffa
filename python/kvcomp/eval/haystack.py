"""Text that the generated tasks are made of: reproducible draws, filler lines, and needles placed among them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from .words import ADJECTIVES, OBJECTS, PLACES, SUBJECTS, VERBS

T = TypeVar("T")


class Draw:
    """Random choices that are the same on every platform and Python version.

    Only ``random.Random.random()`` is used: its sequence for an integer seed is the one that Python's documentation
    promises to keep; ``choice``, ``shuffle`` and ``sample`` may change from one version to the next.
    """

    def __init__(self, key: str) -> None:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
        self._next = random.Random(seed).random

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._next() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def distinct(self, items: Sequence[T], n: int) -> list[T]:
        """n different entries of ``items``, in random order."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.distinct(items, len(items))

    def number(self) -> str:
        """Seven digits, the first not zero."""
        return str(1_000_000 + self.below(9_000_000))

    def numbers(self, n: int) -> list[str]:
        """n different numbers."""
        found: dict[str, None] = {}
        while len(found) < n:
            found[self.number()] = None
        return list(found)

    def coined_words(self, n: int) -> list[str]:
        """n different made-up words of six letters, such as "vokeda"."""
        found: dict[str, None] = {}
        while len(found) < n:
            found["".join(self.pick("bdfgklmnprstvz") + self.pick("aeiou") for _ in range(3))] = None
        return list(found)


def _sentences(draw: Draw) -> Iterator[str]:
    while True:
        yield (
            f"The {draw.pick(ADJECTIVES)} {draw.pick(SUBJECTS)} {draw.pick(VERBS)} "
            f"the {draw.pick(ADJECTIVES)} {draw.pick(OBJECTS)} {draw.pick(PLACES)}."
        )


def _consecutive(draw: Draw, lines: Sequence[str]) -> Iterator[str]:
    start = draw.below(len(lines))
    while True:
        yield lines[start]
        start = (start + 1) % len(lines)


def filler(draw: Draw, size: int, haystack: Sequence[str] | None) -> list[str]:
    """Lines, each with its newline, of ``size`` bytes in all; the last is cut to fit.

    They are generated sentences, or with ``haystack`` (ASCII lines) consecutive lines of it from a random start.
    """
    source = _sentences(draw) if haystack is None else _consecutive(draw, haystack)
    lines = []
    while size > 0:
        line = next(source)[: size - 1] + "\n"
        lines.append(line)
        size -= len(line)
    return lines


def place(draw: Draw, lines: Sequence[str], groups: Sequence[Sequence[str]]) -> str:
    """The lines with needles put between them at random places; the needles of one group keep their order."""
    order = draw.shuffled([index for index, group in enumerate(groups) for _ in group])
    slots = sorted(draw.below(len(lines) + 1) for _ in order)
    waiting = [iter(group) for group in groups]
    parts: list[str] = []
    used = 0
    for slot, index in zip(slots, order, strict=True):
        parts.extend(lines[used:slot])
        parts.append(next(waiting[index]))
        used = slot
    parts.extend(lines[used:])
    return "".join(parts)
