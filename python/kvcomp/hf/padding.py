"""Padding of a batch: where every sequence has real tokens, and how the rows of one forward pass are brought to the
left-padded form that the packed cache takes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Rows:
    """The q new rows of every sequence in one forward pass."""

    valid: torch.Tensor | None = None  # (b,) int32 on the CPU: real rows of a sequence; None: all of them
    order: torch.Tensor | None = None  # (b,q) int64: brings the padding to the left; None: it is there already

    def to(self, device: torch.device) -> "Rows":
        """For rows on `device`."""
        return self if self.order is None else Rows(self.valid, self.order.to(device))

    @property
    def counts(self) -> np.ndarray[Any, Any] | None:
        """`valid` as an array."""
        return None if self.valid is None else self.valid.numpy()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """(b,h,q,d) with the padding of every sequence moved to the left."""
        return rows if self.order is None else _take(rows, self.order)

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """What gather did, undone."""
        return rows if self.order is None else _take(rows, self.order.argsort(dim=1))


def _take(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return rows.gather(2, order[:, None, :, None].expand(rows.shape))


def left_padding(real: torch.Tensor) -> torch.Tensor:
    """real (b,s) bool of a prompt -> (b,) int32, the first real position of every sequence; s: all of it is padding.

    ValueError where a sequence has padding behind a real token."""
    for sequence, row in enumerate(real):
        tokens = int(row.sum())
        if not bool(row[len(row) - tokens :].all()):
            kind = "holes" if bool(row[-1]) else "padding on the right"
            raise ValueError(f"Cache: attention_mask: expected padding on the left, got {kind} in sequence {sequence}")
    return (real.shape[1] - real.sum(dim=1)).to(torch.int32)


def new_rows(real: torch.Tensor) -> Rows:
    """real (b,q) bool of later tokens -> Rows. Padding may lie anywhere but behind a sequence's last real row, where
    the next token would be read from a row of padding; a sequence may be all padding."""
    if bool(real.all()):
        return Rows()
    valid = real.sum(dim=1)
    for sequence in range(real.shape[0]):
        if bool(valid[sequence]) and not bool(real[sequence, -1]):
            raise ValueError(
                f"Cache: attention_mask: expected padding on the left, got padding on the right in sequence {sequence}"
            )
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    straight = bool((order == torch.arange(real.shape[1])).all())
    return Rows(valid.to(torch.int32), None if straight else order)


class Padding:
    """Which positions seen so far were padding, as runs: lengths, alternately of padding and of real tokens."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []

    def extend(self, real: torch.Tensor | None, batch: int, count: int) -> None:
        """Adds `count` positions: real (b,count) bool, None where none of them is padding."""
        if not self.runs:
            self.runs = [[0, 0] for _ in range(batch)]
        for sequence, runs in enumerate(self.runs):
            if real is None:
                runs[-1] += count
                continue
            values, lengths = torch.unique_consecutive(real[sequence], return_counts=True)
            for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
                # Runs end with a real one: padding is followed by an empty run of real tokens.
                if value:
                    runs[-1] += length
                elif runs[-1] == 0:
                    runs[-2] += length
                else:
                    runs += [length, 0]

    def real(self) -> torch.Tensor:
        """(b, positions seen) bool."""
        kinds = [torch.arange(len(runs)) % 2 == 1 for runs in self.runs]
        return torch.stack(
            [kind.repeat_interleave(torch.tensor(runs)) for kind, runs in zip(kinds, self.runs, strict=True)]
        )

    def tokens(self) -> int:
        """Real tokens of all sequences."""
        return sum(sum(runs[1::2]) for runs in self.runs)

    def select(self, indices: list[int]) -> None:
        """The batch becomes its sequences `indices`, in that order."""
        self.runs = [list(self.runs[index]) for index in indices]
