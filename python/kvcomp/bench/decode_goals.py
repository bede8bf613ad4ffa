"""What is asked of whole decode steps, for the cells of ``kvcomp bench decode``, which are put beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Of Llama-3.1-8B's shape, 32k tokens of prompt and 4 bits of K and V: a token, by bits of weights and by batch.
_TPOT_MS = {16: {1: 5.5, 8: 7.5}, 4: {1: 3.0, 8: 5.0}}
_TIMES_PLAIN = {1: 3.0, 8: 9.0}  # faster than the better one of transformers' DynamicCache and StaticCache
_TTFT_RATIO = 1.01  # first token, over the fastest plain one
_KV_RATIO = 3  # times that bf16's KV bytes are those held, everything counted
_USUAL = {"model": "llama-3.1-8b", "s": 32768, "k_bits": 4, "v_bits": 4}


def relate(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells with what they are beside the plain caches at the same place (``times_plain``, ``ttft_ratio``), and,
    of the shape and bits that targets are for, with those (goals)."""
    cells = list(cells)
    related = []
    for cell in cells:
        cell, case = dict(cell), cell["case"]
        if cell["impl"] == "kvcomp":
            plain = [other for other in cells if is_plain(other) and place(other) == place(cell)]
            if plain:
                cell["times_plain"] = min(other["tpot_ms"] for other in plain) / cell["tpot_ms"]
                cell["ttft_ratio"] = cell["ttft_ms"] / min(other["ttft_ms"] for other in plain)
            if all(case.get(name) == usual for name, usual in _USUAL.items()):
                weights, batch = case.get("w_bits", 16), case["b"]
                if batch in _TPOT_MS[weights]:
                    cell["target_tpot_ms"] = _TPOT_MS[weights][batch]
                if weights == 16:
                    cell |= {"target_ttft_ratio": _TTFT_RATIO, "target_kv_ratio": _KV_RATIO}
                    if batch in _TIMES_PLAIN:
                        cell["target_times_plain"] = _TIMES_PLAIN[batch]
        related.append(cell)
    return related


def is_plain(cell: dict[str, Any]) -> bool:
    """Of a rival with a 16-bit cache."""
    return bool(cell["impl"] != "kvcomp" and cell["case"]["k_bits"] == 16)


def place(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What cells that are compared have in common: the model, its batch and the prompt."""
    return tuple(cell["case"].get(name) for name in ("model", "b", "s"))
