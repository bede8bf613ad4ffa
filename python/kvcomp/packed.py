"""The packed layers of one cache, what they take, and what was decided about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from . import _C
from .devices import arena_on, kind_of_layer, refuse_hold, stack
from .layer_input import Array
from .pages import copied
from .policy import Policy
from .store import LEDGER, PackedLayer


@dataclass
class Report:
    """What a plan decided. Counts are over all layers unless they are lists per layer.

    ``configured`` holds what the policy asked for, ``effective`` what became of it under the budget.
    """

    prompt_tokens: int  # real tokens of all sequences
    bf16_bytes: int  # of the uncompressed cache of those tokens
    budget_bytes: int | None
    planned_bytes: int
    least_bytes: int | None  # of the smallest plan, before the arena rounds up
    kept_fraction: float
    kept_per_layer: list[float]
    bytes_per_layer: list[int]  # of pages and tables, before slabs are rounded up
    bits_per_element: float  # of kept tokens' codes
    tokens_per_class: dict[str, int]  # "k_bits/v_bits" -> tokens
    high_precision_fraction: float  # of kept tokens at 16 bits, sinks and window included
    over_budget: bool = False  # the smallest plan was kept although it does not fit
    configured: dict[str, Any] = field(default_factory=dict)
    effective: dict[str, Any] = field(default_factory=dict)


class Packed:
    """The packed layers of one prompt, and what they take.

    Attributes:
        positions: per layer, the token at each stored place, lists one after the other in page order, where they were
            asked for. Attention needs none; they serve measurements, and are not part of the cache's bytes.
        stacked: how passes run over layers on a GPU (kvcomp.store_cuda); None: they are on the CPU.
        hold_bytes: what ``nbytes`` never exceeds while tokens are appended (``Policy.decode="hold"``); None: no limit.
    """

    def __init__(
        self,
        arena: _C.Arena,
        layers: list[PackedLayer],
        report: Report,
        policy: Policy,
        positions: list[Array] | None = None,
        hold_bytes: int | None = None,
    ) -> None:
        self.arena, self.layers, self.report, self.policy = arena, layers, report, policy
        self.positions, self.hold_bytes = positions, hold_bytes
        self.stacked = stack(arena, layers)

    def to(self, device: Any) -> Packed:
        """A copy on another device, a torch.device or its name. NotImplementedError for a held budget on a GPU."""
        import torch

        wanted = torch.device(device)
        if wanted.type == "cuda" and self.hold_bytes is not None:
            refuse_hold("to", wanted)
        if self.stacked is not None:
            self.stacked.read()
        arena = arena_on(wanted)
        kind = kind_of_layer(arena)
        layers = [
            kind(
                arena, layer.coding, table, layer.lists.copy(), heads=layer.heads, layer=layer.layer,
                aged=layer.aged.copy(), window=layer.window, ranks=None if layer.ranks is None else layer.ranks.copy(),
                rotation=layer.rotation, decay=layer.decay,
            )
            for layer, table in zip(self.layers, copied(self.layers, arena), strict=True)
        ]  # fmt: skip
        return Packed(arena, layers, self.report, self.policy, self.positions, self.hold_bytes)

    @property
    def nbytes(self) -> int:
        """Everything held: slabs of the arena, page tables, list states."""
        return int(self.arena.nbytes) + sum(layer.table_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """bf16 bytes of the prompt's real tokens over ``nbytes`` as it is now."""
        return self.report.bf16_bytes / self.nbytes

    def ledger(self) -> dict[str, int]:
        """Bytes by use: codes, scales, positions, page_table, slack, window; they sum to ``nbytes``."""
        ledger = dict.fromkeys(LEDGER, 0)
        for layer in self.layers:
            for name, nbytes in layer.page_ledger().items():
                ledger[name] += nbytes
            ledger["page_table"] += layer.table_bytes
        ledger["slack"] = self.nbytes - sum(ledger.values())
        return ledger


def ratio_text(ratio: float) -> str:
    """A ratio that still works, rounded down to hundredths."""
    return f"{math.floor(100 * ratio) / 100:.2f}"
