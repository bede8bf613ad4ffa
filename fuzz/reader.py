"""Bytes of a fuzzer -> choices and numbers; and calls that may refuse, but only as their contracts say."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# Where types, bounds and rounding end.
NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4096, 1 << 20, 1 << 24),
    *(2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64 - 1),
    *(2**64, 10**400, -(10**5000)),
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-30,
    3.4e38,
    3.5e38,
    1e308,
    5e-324,
    float("inf"),
    -float("inf"),
    float("nan"),
)


class Reader:
    """Every choice takes bytes from the front; when they are used up, zeros are read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return max(0, len(self.data) - self.at)

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        self.at += count
        return part.ljust(count, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]

    def below(self, n: int) -> int:
        return (self.byte() if n <= 256 else int.from_bytes(self.take(4), "little")) % max(n, 1)

    def flag(self) -> bool:
        return self.byte() % 2 == 1

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def whole(self) -> int:
        """One of the numbers of interest, or any of 32 bits."""
        place = self.below(2 * len(NUMBERS))
        return NUMBERS[place] if place < len(NUMBERS) else int.from_bytes(self.take(4), "little", signed=True)

    def real(self) -> float:
        place = self.below(2 * len(FLOATS))
        return FLOATS[place] if place < len(FLOATS) else float(struct.unpack("<f", self.take(4))[0])

    def rest(self) -> bytes:
        return self.take(self.left)


class Finding(AssertionError):
    """What a target found wrong that raised nothing by itself."""


# Told the shape of every refusal (one.py makes coverage of it: C code gives none).
heard: Callable[[str], None] | None = None


@contextlib.contextmanager
def refusing(*errors: type[Exception], sentence: str = r"[a-z_]+: ") -> Iterator[None]:
    """What is called inside may raise these errors with one line of text that begins like ``sentence``; no others."""
    try:
        yield
    except errors as error:
        text = str(error)
        if "\n" in text or not re.match(sentence, text):
            raise Finding(f"a refusal that is no sentence: {text!r}") from error
        if heard is not None:
            heard(re.sub(r"^load: [^:]*|\d+|'.*?'|, got.*", "#", text[:200]))
    else:
        if heard is not None:
            heard("done")
